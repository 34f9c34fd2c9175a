//! The store: the only module that speaks SQL.
//!
//! It hides PostgreSQL behind functions on sessions, the outbox and topics. No S3 or Kafka call happens inside a transaction.
//!
//! No write overwrites another writer's change by accident. `save` computes the new state from a row that it read before, so it
//! names the version of that row. Every other write names all its conditions in its `where` clause: the state, the lease, the
//! multipart upload, the part hash.

mod admin;
mod audit;
mod clock;
mod group_commit;
mod migrate;
mod notifications;
mod outbox;
mod pool;
mod replicas;
mod sessions;
mod tenant_limiter;
mod topics;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection, query, query_scalar};
use time::OffsetDateTime;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::failpoint::InjectedError;
use crate::session::{self, Session};

pub(crate) use audit::{ObjectOwner, ObservedRecord, PAGE_SIZE, SessionStatus};
pub(crate) use notifications::{MAX_PAYLOAD_BYTES, Notifications};
pub(crate) use outbox::{Claim, ClaimRequest, Deferred, OutboxRow, ShardLease, Unrecorded, UnrecordedSession};
pub(crate) use replicas::{Renewal, RenewalRequest};
pub use sessions::Quota;
pub(crate) use sessions::{CreateOutcome, Filter, NewSession, SessionPage, StoredPolicy, Transition, VerifiedPut};
pub(crate) use tenant_limiter::TenantLimiter;

/// The default timeout of one call. A client gets a response within two seconds, even if the database does not respond.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(1700);

/// Whether the database accepts no writes.
const IS_READ_ONLY: &str = "select pg_is_in_recovery() or current_setting('transaction_read_only')::bool";

/// How to reach PostgreSQL, and how many connections and how much time one replica may use.
#[derive(Clone)]
pub struct Settings {
    /// `DATABASE_URL`.
    pub url: String,
    /// How many connections this replica opens at most.
    pub max_connections: u32,
    /// How long a caller waits for one call.
    pub call_timeout: Duration,
    /// `LFS_BROKER_TENANT_CONNECTIONS`; 0: no limit.
    pub tenant_connections: u32,
}

impl Settings {
    /// Settings for `url` with the default number of connections.
    pub fn new(url: &str) -> Self {
        // 20 connections keep two cores of PostgreSQL busy and leave room for other replicas under its default of 100.
        Self { url: url.to_owned(), max_connections: 20, call_timeout: CALL_TIMEOUT, tenant_connections: 5 }
    }
}

/// Why a store function failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another writer changed the session first (optimistic locking).
    #[error("session {0} was changed by another writer; read it again")]
    VersionConflict(Uuid),
    /// A row breaks the rules of its state.
    #[error("the row of session {id} breaks the rules of its state: {reason}")]
    Corrupt {
        /// The session.
        id: Uuid,
        /// Which rule the row breaks.
        reason: String,
    },
    /// Another transaction held a needed lock until `lock_timeout`.
    #[error("could not get a database lock in time, because another transaction holds it; retry")]
    LockTimeout,
    /// The process is shutting down, so the task was not run.
    #[error("the broker is shutting down")]
    ShuttingDown,
    /// The database was not reachable, did not answer in time, or returned an error.
    #[error("database: {}", in_words(.0))]
    Database(#[source] sqlx::Error),
    /// The schema could not be migrated.
    #[error("applying the migrations failed: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The database accepts no writes.
    #[error("the database is read-only: it is a standby, or default_transaction_read_only is on")]
    ReadOnly,
    /// `DATABASE_URL` cannot be parsed.
    #[error("DATABASE_URL is not a PostgreSQL URL such as postgres://USER:PASSWORD@HOST:5432/DATABASE")]
    InvalidUrl,
    /// The schema is older than this program requires.
    #[error("the database schema is at version {found}, this program needs {required}: run `lfs-broker migrate`")]
    OutdatedSchema {
        /// The applied version.
        found: i64,
        /// The required version.
        required: i64,
    },
}

impl Error {
    /// Whether no connection could be opened, or the connection broke.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Io(_)))
    }

    /// Whether the database refused the statement for a lasting reason. A retry succeeds only after an operator has changed
    /// something.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            // Transient error classes (PostgreSQL, appendix A): connection, transaction rollback, resources, shutdown.
            Self::Database(sqlx::Error::Database(error)) => {
                !error.code().is_some_and(|code| ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class)))
            }
            Self::OutdatedSchema { .. } | Self::Migration(_) | Self::InvalidUrl => true,
            _ => false,
        }
    }
}

/// An error of the database in plain words.
fn in_words(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Io(error) => error.to_string(),
        sqlx::Error::PoolTimedOut => "all connections to PostgreSQL are in use".to_owned(),
        sqlx::Error::Database(error) => match error.code().as_deref() {
            // 28P01: invalid_password (PostgreSQL, appendix A).
            Some("28P01") => format!("PostgreSQL refused the password in DATABASE_URL: {}", error.message()),
            // 3D000: invalid_catalog_name.
            Some("3D000") => {
                format!("{}: create it, or name another database in DATABASE_URL", error.message())
            }
            Some(code) => format!("{} (SQLSTATE {code})", error.message()),
            None => error.message().to_owned(),
        },
        error => error.to_string(),
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        // 55P03, lock_not_available: lock_timeout ended while another transaction held the row (PostgreSQL, appendix A).
        match error.as_database_error().and_then(|error| error.code()) {
            Some(code) if code == "55P03" => Self::LockTimeout,
            _ => Self::Database(error),
        }
    }
}

impl From<InjectedError> for Error {
    /// The caller sees the same error as after a COMMIT whose response was lost.
    fn from(error: InjectedError) -> Self {
        Self::Database(sqlx::Error::Io(std::io::Error::other(error)))
    }
}

/// The identity that all replicas on one database share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deployment {
    pub(crate) id: Uuid,
    pub(crate) shards: i32,
}

impl Deployment {
    /// The shard of a session's pointer.
    pub(crate) fn shard_of(self, session: &Session) -> i32 {
        session::shard(&session.spec.topic, session.spec.key.as_deref(), session.id, self.shards)
    }
}

/// A handle to the database; cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: pool::Pool,
    options: Arc<PgConnectOptions>,
    tenant_limiter: Arc<TenantLimiter>,
    clock: Arc<clock::Clock>,
    /// The opens that wait for a statement of their tenant.
    opens: group_commit::GroupCommit<Arc<NewSession>, CreateOutcome>,
    /// The verified PUTs that wait for a statement of their tenant.
    verified_puts: group_commit::GroupCommit<Arc<VerifiedPut>, Session>,
    /// Read once: the identity of a deployment never changes.
    deployment: Arc<OnceCell<Deployment>>,
}

impl Store {
    /// Creates a store. It connects to the database when the first function needs a connection.
    ///
    /// # Errors
    /// [`Error::InvalidUrl`] when the URL cannot be parsed.
    pub fn connect(settings: &Settings) -> Result<Self, Error> {
        let options = connect_options(&settings.url)?;
        let pool = pool::Pool::new(&options, settings.max_connections, settings.call_timeout);
        let tenant_limiter = Arc::new(TenantLimiter::new(settings.tenant_connections));
        Ok(Self {
            pool,
            options: Arc::new(options),
            tenant_limiter,
            clock: Arc::default(),
            opens: group_commit::GroupCommit::default(),
            verified_puts: group_commit::GroupCommit::default(),
            deployment: Arc::default(),
        })
    }

    /// Migrates the schema to this program's version. Several processes may run it at once, while brokers serve requests.
    ///
    /// # Errors
    /// When the database is unreachable or a migration fails.
    pub async fn migrate(&self) -> Result<(), Error> {
        // A separate connection without a statement timeout: building the index of a large table can take minutes.
        let options = PgConnectOptions::clone(&self.options).options([("statement_timeout", "0")]);
        let connected = self.pool.with_timeout(async {
            Ok(PgConnection::connect_with(&options).await.map_err(|error| pool::with_address(&options, error))?)
        });
        let mut connection = connected.await?;
        migrate::run(&mut connection).await?;
        // The migrations are committed, so a failure of the closing handshake changes nothing.
        let _ = self.pool.with_timeout(async { Ok(connection.close().await?) }).await;
        Ok(())
    }

    /// Checks that the schema has at least the version that this program requires.
    ///
    /// # Errors
    /// [`Error::OutdatedSchema`] when it is older.
    pub async fn check_schema(&self) -> Result<(), Error> {
        let required = migrate::required_version();
        let applied = sqlx::query_scalar::<_, Option<i64>>("select max(version) from _sqlx_migrations where success");
        let found = match applied.fetch_one(&self.pool).await {
            Ok(found) => found.unwrap_or(0),
            // 42P01, undefined_table: no migration was ever applied.
            Err(error) if error.as_database_error().and_then(|error| error.code()).as_deref() == Some("42P01") => 0,
            Err(error) => return Err(error.into()),
        };
        if found < required { Err(Error::OutdatedSchema { found, required }) } else { Ok(()) }
    }

    /// The current time by the database's clock, so that replicas with wrong clocks agree. The database is asked only now and
    /// then ([`clock`]).
    pub(crate) async fn now(&self) -> Result<OffsetDateTime, Error> {
        match self.clock.now() {
            clock::Known::Time(now) => Ok(now),
            clock::Known::TimeToRenew(now) => {
                let store = self.clone();
                tokio::spawn(async move {
                    // If it fails, the next caller tries again, and the reading stays usable for a while.
                    let _ = store.read_clock().await;
                    store.clock.end_renewal();
                });
                Ok(now)
            }
            clock::Known::Nothing => self.read_clock().await,
        }
    }

    async fn read_clock(&self) -> Result<OffsetDateTime, Error> {
        let asked_at = Instant::now();
        let now = query_scalar!(r#"select clock_timestamp() as "now!""#).fetch_one(&self.pool).await?;
        Ok(self.clock.set(now, asked_at))
    }

    /// Advances the clock of this handle and its clones, for tests.
    pub fn advance_clock(&self, by: Duration) {
        self.clock.advance(by);
    }

    /// Checks that the database answers and accepts writes.
    pub(crate) async fn reachable(&self) -> Result<(), Error> {
        match sqlx::query_scalar::<_, bool>(IS_READ_ONLY).fetch_one(&self.pool).await? {
            true => Err(Error::ReadOnly),
            false => Ok(()),
        }
    }

    /// Runs updates that match no row and rolls them back. It fails when the role lacks write privileges.
    pub(crate) async fn check_write(&self) -> Result<(), Error> {
        self.pool
            .with_timeout(async {
                let mut tx = self.pool.begin().await?;
                if sqlx::query_scalar(IS_READ_ONLY).fetch_one(&mut *tx).await? {
                    tx.rollback().await?;
                    return Err(Error::ReadOnly);
                }
                sqlx::query("update deployment set shards = shards where false").execute(&mut *tx).await?;
                // PostgreSQL checks the privilege on the table even though no row matches.
                sqlx::query("update upload_sessions set version = version where false").execute(&mut *tx).await?;
                Ok(tx.rollback().await?)
            })
            .await
    }

    /// The identity of this deployment.
    pub(crate) async fn deployment(&self) -> Result<Deployment, Error> {
        let read = || async {
            let row = query!("select id, shards from deployment").fetch_one(&self.pool).await?;
            Ok(Deployment { id: row.id, shards: row.shards })
        };
        self.deployment.get_or_try_init(read).await.copied()
    }

    /// Closes all connections. It does not wait for connections that do not answer.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// Parses a URL and sets the session parameters that the store needs, whatever the defaults of the server, database or role.
fn connect_options(url: &str) -> Result<PgConnectOptions, Error> {
    // The parser accepts any scheme.
    if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
        return Err(Error::InvalidUrl);
    }
    // `user@/db`, as for a socket in `?host=`: PostgreSQL's own clients accept it, a URL parser does not.
    let options: PgConnectOptions = url.replacen("@/", "@localhost/", 1).parse().map_err(|_| Error::InvalidUrl)?;
    // An IPv6 address has brackets only in a URL.
    let address = options.get_host().strip_prefix('[').and_then(|host| host.strip_suffix(']')).map(str::to_owned);
    let options = match address {
        Some(address) => options.host(&address),
        None => options,
    };
    Ok(options.application_name("lfs-broker").options([
        // Limits: a client gets a response within 2 s, and a transaction of a stalled process releases its locks.
        ("lock_timeout", "1500ms"),
        ("idle_in_transaction_session_timeout", "10s"),
        // A stricter level fails concurrent statements. No statement here needs it, because each names its conditions in `where`.
        ("default_transaction_isolation", "read committed"),
        // Statements are short, so JIT compilation takes longer than running them.
        ("jit", "off"),
        ("plan_cache_mode", "auto"),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_in_the_url_is_used_without_its_brackets() {
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
        for url in ["not a url", "mysql://x", "https://127.0.0.1:5432/lfs", "postgres:/x"] {
            assert!(matches!(connect_options(url), Err(Error::InvalidUrl)), "{url}");
        }
    }
}
