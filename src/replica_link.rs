//! The link to the other replicas: sends this replica's messages and receives theirs, over PostgreSQL's notifications.
//!
//! It has its own connection and reconnects by itself. A replica that does not receive its own messages receives none, for
//! example through PgBouncer in transaction mode. It then polls faster while other replicas exist, as [`Replicas::must_poll`]
//! says.
//!
//! [`Replicas::must_poll`]: crate::notify::Replicas::must_poll

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::notify::{ChangeNotifier, empty_payload};
use crate::store::{self, MAX_PAYLOAD_BYTES, Notifications, Store};

/// How long a replica waits for its own message before it concludes that it receives none.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle link checks that it still receives: a connection can end without a sign.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// The pause before the link reconnects. It doubles with each failure.
const MIN_RECONNECT_PAUSE: Duration = Duration::from_millis(100);
const MAX_RECONNECT_PAUSE: Duration = Duration::from_secs(30);

/// Sends and receives the messages of one replica.
pub(crate) struct ReplicaLink {
    store: Store,
    notifier: Arc<ChangeNotifier>,
    owner: Uuid,
    /// Whether the log says that no messages arrive.
    is_failure_logged: bool,
    reconnect_pause: Duration,
}

/// Why a connection ended before the shutdown.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Store(#[from] store::Error),
    #[error(
        "a notification did not arrive within {} s: a connection pooler in transaction mode, such as PgBouncer, forwards none",
        RECEIVE_TIMEOUT.as_secs()
    )]
    NothingReceived,
}

impl ReplicaLink {
    pub(crate) fn new(store: Store, notifier: Arc<ChangeNotifier>, owner: Uuid) -> Self {
        Self { store, notifier, owner, is_failure_logged: false, reconnect_pause: MIN_RECONNECT_PAUSE }
    }

    /// Keeps the link until the shutdown, and sends the queued messages last.
    pub(crate) async fn run(mut self, stopped: CancellationToken) {
        while !stopped.is_cancelled() {
            let Err(error) = self.connect_and_serve(&stopped).await else { return };
            self.notifier.replicas.set_receiving(false);
            self.log_failure(&error);
            // Jitter: replicas that lost their connections together must not reconnect together.
            let pause = self.reconnect_pause.mul_f64(0.75 + fastrand::f64() / 2.0);
            self.reconnect_pause = (self.reconnect_pause * 2).min(MAX_RECONNECT_PAUSE);
            let _ = tokio::time::timeout(pause, stopped.cancelled()).await;
        }
    }

    async fn connect_and_serve(&mut self, stopped: &CancellationToken) -> Result<(), Error> {
        let mut connection = match stopped.run_until_cancelled(self.store.listen()).await {
            Some(connected) => connected?,
            None => return Ok(()),
        };
        let served = self.serve(&mut connection, stopped).await;
        connection.close().await;
        served
    }

    /// Sends and receives until the shutdown or until the connection fails.
    async fn serve(&mut self, connection: &mut Notifications, stopped: &CancellationToken) -> Result<(), Error> {
        let notifier = Arc::clone(&self.notifier);
        connection.send(&empty_payload(self.owner)).await?;
        // When an own message must have arrived, while one is on its way; else when the next check begins.
        let (mut is_checking, mut deadline) = (true, Instant::now() + RECEIVE_TIMEOUT);
        loop {
            // All messages that were queued while the last notification was sent go together.
            let is_stopped = stopped.is_cancelled();
            while let Some(payload) = notifier.replicas.next_payload(self.owner, MAX_PAYLOAD_BYTES) {
                connection.send(&payload).await?;
                while let Some(received) = connection.next_received() {
                    self.receive(&received, &mut is_checking, &mut deadline);
                }
            }
            if is_stopped {
                return Ok(());
            }
            tokio::select! {
                received = connection.receive() => self.receive(&received?, &mut is_checking, &mut deadline),
                () = notifier.replicas.queued.notified() => {}
                () = stopped.cancelled() => {}
                () = tokio::time::sleep_until(deadline) => {
                    if is_checking {
                        return Err(Error::NothingReceived);
                    }
                    connection.send(&empty_payload(self.owner)).await?;
                    (is_checking, deadline) = (true, Instant::now() + RECEIVE_TIMEOUT);
                }
            }
        }
    }

    /// Acts on a payload. An own one shows that the link works.
    fn receive(&mut self, payload: &str, is_checking: &mut bool, deadline: &mut Instant) {
        if !self.notifier.receive(payload, self.owner) {
            return;
        }
        (*is_checking, *deadline) = (false, Instant::now() + CHECK_INTERVAL);
        self.reconnect_pause = MIN_RECONNECT_PAUSE;
        if !self.notifier.replicas.set_receiving(true) {
            // Messages were lost while there was no connection.
            self.notifier.wake_all();
            if std::mem::take(&mut self.is_failure_logged) {
                info!("this replica receives notifications from PostgreSQL again");
            }
        }
    }

    fn log_failure(&mut self, error: &Error) {
        if !std::mem::replace(&mut self.is_failure_logged, true) {
            let polls = self.notifier.settings.poll_interval.as_millis() / 5;
            warn!(
                %error,
                "this replica receives no notifications from PostgreSQL: {error}; it works, but while other replicas run it \
                 asks PostgreSQL for their changes every {polls} ms; reconnecting until notifications arrive"
            );
        }
    }
}
