//! The connection on which a replica sends and receives PostgreSQL's notifications (`LISTEN`, `NOTIFY`).
//!
//! It is not part of the pools: it stays open, and no request waits for it. Notifications are sent outside of the transactions
//! that they report, because `NOTIFY` makes the commits of all notifying transactions wait for each other.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::{PgPool, query};
use tokio::time::timeout;

use super::{Error, Store, pool};

/// The channel of all replicas of one database.
const CHANNEL: &str = "lfs_broker";
/// The most bytes of one payload. PostgreSQL refuses 8,000 and more.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 7_900;
/// How long opening the connection may take, and how long sending one notification.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long closing the connection may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// An open connection that listens.
pub(crate) struct Notifications {
    listener: PgListener,
    /// The listener's connection belongs to a pool of one.
    pool: PgPool,
}

impl Store {
    /// Opens a connection and listens.
    pub(crate) async fn listen(&self) -> Result<Notifications, Error> {
        // Operators and tests find the connection by its name. A lost notification only costs time, so none waits for the disk.
        let options = PgConnectOptions::clone(&self.options).application_name("lfs-broker notifications");
        let options = options.options([("synchronous_commit", "off"), ("statement_timeout", "5s")]);
        let connect = async {
            let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
            let pool = pool.acquire_timeout(CALL_TIMEOUT).connect_lazy_with(options.clone());
            let mut listener = PgListener::connect_with(&pool).await?;
            // The caller must know that notifications may be lost, so a lost connection is an error.
            listener.eager_reconnect(false);
            listener.listen(CHANNEL).await?;
            Ok(Notifications { listener, pool })
        };
        let connected = timeout(CALL_TIMEOUT, connect).await.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        Ok(connected.map_err(|error| pool::with_address(&options, error))?)
    }
}

impl Notifications {
    /// Sends a notification to all replicas that listen, also to this one.
    pub(crate) async fn send(&mut self, payload: &str) -> Result<(), Error> {
        let send = query("select pg_notify($1, $2)").bind(CHANNEL).bind(payload).execute(&mut self.listener);
        timeout(CALL_TIMEOUT, send).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
        Ok(())
    }

    /// Waits for the next notification, and returns its payload. No notification is lost if the caller stops waiting.
    pub(crate) async fn receive(&mut self) -> Result<String, Error> {
        match self.listener.try_recv().await? {
            Some(notification) => Ok(notification.payload().to_owned()),
            None => Err(sqlx::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset)).into()),
        }
    }

    /// The next notification that arrived while one was sent.
    pub(crate) fn next_received(&mut self) -> Option<String> {
        self.listener.next_buffered().map(|notification| notification.payload().to_owned())
    }

    /// Closes the connection.
    pub(crate) async fn close(self) {
        drop(self.listener);
        // The server also notices a connection that just ends.
        let _ = timeout(CLOSE_TIMEOUT, self.pool.close()).await;
    }
}
