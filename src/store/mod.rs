//! The store: the one room that speaks SQL.
//!
//! It hides PostgreSQL behind verbs on sessions, the outbox and topics. No S3 or Kafka call happens inside a transaction.
//!
//! Nothing of a session is overwritten unseen. Whoever moves it by what they read (`save`) names the version they read.
//! Every other write says in its `where` all that it rests on: the state, the lease, the multipart upload, the promise.

mod audit;
mod migrate;
mod operate;
mod outbox;
mod pool;
mod sessions;
mod tenants;
mod topics;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection, query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::failpoint::Struck;

pub(crate) use audit::{Found, Owner, PAGE, Standing};
pub(crate) use outbox::{Claim, Ownership, Parked, Placed, Waiting};
pub use sessions::Quota;
pub(crate) use sessions::{Created, Filter, Listed, Move};
pub(crate) use tenants::Turns;

/// A caller hears within two seconds, whatever the database does.
pub const ANSWER_WITHIN: Duration = Duration::from_millis(1700);

/// Where PostgreSQL is, and how much of it is used.
#[derive(Clone)]
pub struct Settings {
    /// `DATABASE_URL`.
    pub url: String,
    /// Most connections of this replica.
    pub max_connections: u32,
    /// How long one call may hold its caller.
    pub answer_within: Duration,
    /// `LFS_BROKER_TENANT_CONNECTIONS`: how many connections one tenant's writing and listing holds at once; 0: no limit.
    pub tenant_connections: u32,
}

impl Settings {
    /// Settings for `url` with the default number of connections.
    pub fn new(url: &str) -> Self {
        // 20 connections keep two cores of PostgreSQL busy and leave room for other replicas under its default of 100.
        // A quarter of them suffices a tenant that waits for its own row anyway, and leaves the others theirs.
        Self { url: url.to_owned(), max_connections: 20, answer_within: ANSWER_WITHIN, tenant_connections: 5 }
    }
}

/// What the store cannot do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Somebody else moved the session first; read it again.
    #[error("session {0} was moved by somebody else")]
    Moved(Uuid),
    /// A row breaks the rules of its state.
    #[error("session {id} breaks the rules of its state: {what}")]
    Corrupt {
        /// The row.
        id: Uuid,
        /// What is wrong with it.
        what: String,
    },
    /// Another request holds what this one needs.
    #[error("another request holds the same row for too long")]
    Busy,
    /// Nobody is left to do it.
    #[error("the broker is ending")]
    Ending,
    /// The database is not there, or did not do it.
    #[error("database: {0}")]
    Database(#[source] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("migration: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// Nothing can be written.
    #[error("the database is read-only: it is a standby, or default_transaction_read_only is on")]
    ReadOnly,
    /// `DATABASE_URL` cannot be read.
    #[error("DATABASE_URL is not a PostgreSQL URL")]
    Url,
    /// The schema is not the one that this program was built for.
    #[error("the database schema is at version {found}, this program needs {needed}: run `lfs-broker migrate`")]
    Schema {
        /// Applied.
        found: i64,
        /// Needed.
        needed: i64,
    },
}

impl Error {
    /// Whether the database answered, and the answer was no: asking again helps once somebody has changed something.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            // Classes of PostgreSQL's errors that pass (its appendix A): connection, conflict, resources, shutdown.
            Self::Database(sqlx::Error::Database(error)) => {
                !error.code().is_some_and(|code| ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class)))
            }
            Self::Schema { .. } | Self::Migration(_) | Self::Url => true,
            _ => false,
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // 55P03: lock_timeout ran out while another transaction held the row (PostgreSQL, appendix A).
        match error.as_database_error().and_then(|error| error.code()) {
            Some(code) if code == "55P03" => Self::Busy,
            _ => Self::Database(error),
        }
    }
}

impl From<Struck> for Error {
    /// As when the answer to a COMMIT is lost.
    fn from(struck: Struck) -> Self {
        Self::Database(sqlx::Error::Io(std::io::Error::other(struck)))
    }
}

/// The identity that every replica on one database shares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deployment {
    pub(crate) id: Uuid,
    pub(crate) shards: i32,
}

/// A handle on the database; cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: pool::Pool,
    options: PgConnectOptions,
    turns: Arc<Turns>,
    shift_ms: Arc<AtomicI64>,
}

impl Store {
    /// A store on a database that is reached when it is first needed.
    ///
    /// # Errors
    /// [`Error::Url`] when the URL cannot be read.
    pub fn connect(settings: &Settings) -> Result<Self, Error> {
        let options = connect_options(&settings.url)?;
        let pool = pool::Pool::new(&options, settings.max_connections, settings.answer_within);
        let turns = Arc::new(Turns::new(settings.tenant_connections));
        Ok(Self { pool, options, turns, shift_ms: Arc::default() })
    }

    /// Brings the schema up to date; several may run at once, and brokers may work meanwhile.
    ///
    /// # Errors
    /// When the database is not there or a migration fails.
    pub async fn migrate(&self) -> Result<(), Error> {
        // A connection of its own, without the bounds of requests: the index of a large table takes its time.
        let options = self.options.clone().options([("statement_timeout", "0")]);
        let connected = self.pool.in_time(async { Ok(PgConnection::connect_with(&options).await?) });
        let mut connection = connected.await?;
        migrate::run(&mut connection).await?;
        // It has ended well, whether or not the goodbye arrives.
        let _ = self.pool.in_time(async { Ok(connection.close().await?) }).await;
        Ok(())
    }

    /// Checks that the schema is the one this program was built for.
    ///
    /// # Errors
    /// [`Error::Schema`] when it is older.
    pub async fn check_schema(&self) -> Result<(), Error> {
        let needed = migrate::needed();
        let applied = sqlx::query_scalar::<_, Option<i64>>("select max(version) from _sqlx_migrations where success");
        let found = match applied.fetch_one(&self.pool).await {
            Ok(found) => found.unwrap_or(0),
            // 42P01: there is no such table, so nothing was ever migrated.
            Err(error) if error.as_database_error().and_then(|error| error.code()).as_deref() == Some("42P01") => 0,
            Err(error) => return Err(error.into()),
        };
        if found < needed { Err(Error::Schema { found, needed }) } else { Ok(()) }
    }

    /// The time, which is the database's: replicas with wrong clocks agree on it.
    pub(crate) async fn now(&self) -> Result<OffsetDateTime, Error> {
        let now = query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(&self.pool).await?;
        Ok(now + time::Duration::milliseconds(self.shift_ms.load(Ordering::Relaxed)))
    }

    /// Pushes the clock of this handle and its clones, for tests.
    pub fn push_clock(&self, by: Duration) {
        let by_ms = i64::try_from(by.as_millis()).expect("a test pushes by less than 292 million years");
        self.shift_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    /// Whether the database answers, and takes writes.
    pub(crate) async fn reachable(&self) -> Result<(), Error> {
        let is_read_only = "select pg_is_in_recovery() or current_setting('transaction_read_only')::bool";
        match sqlx::query_scalar::<_, bool>(is_read_only).fetch_one(&self.pool).await? {
            true => Err(Error::ReadOnly),
            false => Ok(()),
        }
    }

    /// Writes a row and takes it back: a role without rights, or a full disk, is noticed.
    pub(crate) async fn check_write(&self) -> Result<(), Error> {
        self.reachable().await?;
        self.pool
            .in_time(async {
                let mut tx = self.pool.begin().await?;
                sqlx::query("update deployment set shards = shards where false").execute(&mut *tx).await?;
                // It has a right to each row that there will be; none of them is touched.
                sqlx::query("update upload_sessions set version = version where false").execute(&mut *tx).await?;
                Ok(tx.rollback().await?)
            })
            .await
    }

    /// The identity of this deployment.
    pub(crate) async fn deployment(&self) -> Result<Deployment, Error> {
        let row = query!("select id, shards from deployment").fetch_one(&self.pool).await?;
        Ok(Deployment { id: row.id, shards: row.shards })
    }

    /// Closes every connection, and does not wait for those that hang.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// Reads a URL, and sets what a session needs, whatever the server, the database or the role has for a default.
fn connect_options(url: &str) -> Result<PgConnectOptions, Error> {
    // A user without a host, as for a socket in `?host=`: PostgreSQL's own clients take it, URLs in general do not.
    let options: PgConnectOptions = url.replacen("@/", "@localhost/", 1).parse().map_err(|_| Error::Url)?;
    // An IPv6 address has brackets in a URL and nowhere else.
    let address = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')).map(str::to_owned);
    let options = match address {
        Some(address) => options.host(&address),
        None => options,
    };
    Ok(options.application_name("lfs-broker").options([
        // Bounds: a caller hears within 2 s, and a transaction whose owner froze gives its locks back.
        ("lock_timeout", "1500ms"),
        ("idle_in_transaction_session_timeout", "10s"),
        // A stricter level refuses what runs side by side; every statement here says in its `where` all that it rests on.
        ("default_transaction_isolation", "read committed"),
        // Statements are short and planned with their arguments; compiling one takes longer than running it.
        ("jit", "off"),
        ("plan_cache_mode", "auto"),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_in_the_url_is_connected_to_without_its_brackets() {
        for (url, host, port) in [
            ("postgres://u:p@[::1]:5433/db", "::1", 5433),
            ("postgresql://u:p@[2001:db8::7]/db", "2001:db8::7", 5432),
            ("postgres://u:p@127.0.0.1/db", "127.0.0.1", 5432),
            ("postgres://db.example:6432/db", "db.example", 6432),
            ("postgres:///db?host=fe80::1%25eth0", "fe80::1%eth0", 5432),
        ] {
            let options = connect_options(url).unwrap();
            assert_eq!((options.get_host(), options.get_port()), (host, port), "{url}");
        }
        for url in [
            "postgres://u@%2Frun%2Fpostgresql/db",
            "postgres://u@/db?host=/run/postgresql",
            "postgres:///db?host=/run/postgresql",
        ] {
            let options = connect_options(url).unwrap();
            assert_eq!(
                options.get_socket().map(|path| path.display().to_string().trim_end_matches('/').to_owned()).as_deref(),
                Some("/run/postgresql"),
                "{url}"
            );
        }
        assert!(matches!(connect_options("not a url"), Err(Error::Url)));
    }
}
