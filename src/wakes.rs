//! Who wakes whom inside one replica. Losing a wake-up costs time only: every worker also looks by itself.

use std::time::Duration;

use tokio::sync::{Notify, broadcast};
use uuid::Uuid;

/// How often one who waits for a session looks at the database, for another replica may have moved it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// The bells of one replica.
pub(crate) struct Wakes {
    /// A pointer waits in the outbox.
    pub(crate) relay: Notify,
    /// Bytes wait to be read, or a lease ran out.
    pub(crate) verifier: Notify,
    /// S3 holds something that nobody wants.
    pub(crate) sweeper: Notify,
    changed: broadcast::Sender<Uuid>,
}

impl Default for Wakes {
    fn default() -> Self {
        Self { relay: Notify::new(), verifier: Notify::new(), sweeper: Notify::new(), changed: broadcast::channel(1024).0 }
    }
}

impl Wakes {
    /// Tells everyone who waits for this session.
    pub(crate) fn changed(&self, id: Uuid) {
        // Nobody waiting is not an error.
        let _ = self.changed.send(id);
    }

    /// Begins to listen; what changes from now on is heard.
    pub(crate) fn listen(&self) -> Listener {
        Listener(self.changed.subscribe())
    }
}

/// Somebody who waits for a session.
pub(crate) struct Listener(broadcast::Receiver<Uuid>);

impl Listener {
    /// Returns when the session changed, or when it is time to look again.
    pub(crate) async fn wait(&mut self, id: Uuid) {
        let heard = async {
            loop {
                match self.0.recv().await {
                    Ok(changed) if changed == id => return,
                    Ok(_) => {}
                    // Too much happened to hear all of it: look.
                    Err(_) => return,
                }
            }
        };
        let _ = tokio::time::timeout(LOOK_AGAIN, heard).await;
    }
}
