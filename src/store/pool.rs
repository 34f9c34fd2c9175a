//! A connection pool that never waits without a limit, and never opens more connections than the settings allow.
//!
//! Every call has a timeout. When a caller gives up, the pool cancels the caller's statement. The connection keeps its
//! permit until the server confirms that the statement has ended. Requests and workers have separate pools, so neither
//! takes the other's connections. The `statement_timeout` of a connection equals the timeout of its callers.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::postgres::{PgConnectOptions, PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{
    Connection as _, Describe, Either, Execute, Executor, PgConnection, Postgres, Row as _, SqlStr, query, query_scalar, raw_sql,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// Timeout of one worker call. It is longer than a request's timeout, because no client waits for a worker's batch.
pub(super) const WORKER_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of opening a connection. It is longer than a caller waits: a connection that a busy server opens late serves the
/// next caller, so the attempt need not be repeated.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// How long the server may take to confirm that a cancelled statement has ended. It normally takes milliseconds. A server
/// that stays silent for this long has ended the statement by its own `statement_timeout`.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a commit may wait for a synchronous standby before the pool drops its connection.
const STANDBY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long closing all connections may take: the server may be unreachable.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// A connection that was idle for longer is pinged before use: the server may have been restarted.
const PING_AFTER_IDLE: Duration = Duration::from_secs(1);
/// A connection that was idle for longer is closed when the next connection becomes idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// A connection that is older is replaced: the memory of its server process grows with use.
const MAX_LIFETIME: Duration = Duration::from_secs(1800);

/// The connection pools of a store; cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    connections: Arc<ConnectionPool>,
    /// How long a caller waits for one call.
    call_timeout: Duration,
    /// The pool for workers on the same database; `None` in the workers' pool itself.
    worker_pool: Option<Arc<Pool>>,
}

struct ConnectionPool {
    options: PgConnectOptions,
    acquire_timeout: Duration,
    max_connections: u32,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<IdleConnection>>,
    /// The pool whose connections send cancel requests for abandoned statements; `None`: this pool.
    cancel_pool: Option<Arc<ConnectionPool>>,
}

struct OpenConnection {
    connection: PgConnection,
    /// The process id of the PostgreSQL backend. A later process or another server's process may have the same id, so the start
    /// time is compared too.
    backend_pid: i32,
    backend_started_at: String,
    opened_at: Instant,
}

struct IdleConnection {
    open: OpenConnection,
    idle_since: Instant,
}

/// A connection in use. When it is dropped without [`Connection::release`], its current statement is cancelled.
pub(super) struct Connection {
    /// The open connection and its permit; `None` only after it was released.
    inner: Option<(OpenConnection, OwnedSemaphorePermit)>,
    pool: Arc<ConnectionPool>,
    is_used: bool,
    is_in_transaction: bool,
}

/// A transaction. When it is dropped without a commit, it is rolled back.
pub(super) struct Transaction(Connection);

fn timed_out(after: Duration) -> sqlx::Error {
    let message = format!("no answer within {} ms", after.as_millis());
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, message))
}

// `Executor` requires `Debug`. No field is printed, because the options hold a password.
impl std::fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// Two pools that share `max_connections`. Connections are opened when they are first needed.
    pub(super) fn new(options: &PgConnectOptions, max_connections: u32, call_timeout: Duration) -> Self {
        let for_workers = (max_connections / 4).max(1);
        let for_requests = max_connections.saturating_sub(for_workers).max(1);
        let workers = ConnectionPool::new(options, for_workers, WORKER_TIMEOUT, None);
        let requests = ConnectionPool::new(options, for_requests, call_timeout, Some(Arc::clone(&workers)));
        let worker_pool = Self { connections: workers, call_timeout: WORKER_TIMEOUT, worker_pool: None };
        Self { connections: requests, call_timeout, worker_pool: Some(Arc::new(worker_pool)) }
    }

    /// Runs all database work of one store function within the time that a caller waits.
    pub(super) async fn with_timeout<T>(&self, work: impl Future<Output = Result<T, super::Error>>) -> Result<T, super::Error> {
        with_timeout(self.call_timeout, work).await
    }

    /// The pool for workers and for long reads of an operator: its statements may take [`WORKER_TIMEOUT`].
    pub(super) fn worker_pool(&self) -> &Self {
        self.worker_pool.as_deref().unwrap_or(self)
    }

    pub(super) async fn acquire(&self) -> Result<Connection, sqlx::Error> {
        self.connections.acquire().await
    }

    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        let mut connection = self.acquire().await?;
        connection.is_in_transaction = true;
        query("begin").execute(&mut *connection).await?;
        Ok(Transaction(connection))
    }

    pub(super) async fn close(&self) {
        // The process exits after a close, and the exit also closes a connection that does not answer.
        let _ = timeout(CLOSE_TIMEOUT, async {
            self.connections.close().await;
            self.worker_pool().connections.close().await;
        })
        .await;
    }
}

impl ConnectionPool {
    fn new(
        options: &PgConnectOptions,
        max_connections: u32,
        call_timeout: Duration,
        cancel_pool: Option<Arc<Self>>,
    ) -> Arc<Self> {
        let options = options.clone().options([("statement_timeout", format!("{}ms", call_timeout.as_millis()))]);
        Arc::new(Self {
            options,
            // Shorter than the call's timeout, so that the log distinguishes an exhausted pool from a silent server.
            acquire_timeout: call_timeout.mul_f64(0.9),
            max_connections,
            permits: Arc::new(Semaphore::new(max_connections as usize)),
            idle: Mutex::default(),
            cancel_pool,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<IdleConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn acquire(self: &Arc<Self>) -> Result<Connection, sqlx::Error> {
        let has_permit = AtomicBool::new(false);
        match timeout(self.acquire_timeout, self.acquire_without_timeout(&has_permit)).await {
            Ok(acquired) => acquired,
            Err(_) if has_permit.load(Ordering::Relaxed) => Err(with_address(&self.options, timed_out(self.acquire_timeout))),
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        }
    }

    /// Sets `has_permit` once it waits for the server and no longer for other callers.
    async fn acquire_without_timeout(self: &Arc<Self>, has_permit: &AtomicBool) -> Result<Connection, sqlx::Error> {
        let mut permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
        has_permit.store(true, Ordering::Relaxed);
        loop {
            // Takes the connection that became idle last, so that surplus connections reach the idle timeout.
            let Some(idle) = self.idle().pop() else { break };
            let mut connection = Connection::new(Arc::clone(self), idle.open, permit);
            if idle.idle_since.elapsed() < PING_AFTER_IDLE || connection.ping().await.is_ok() {
                connection.is_used = false;
                return Ok(connection);
            }
            permit = connection.discard();
        }
        // A separate task: when this caller gives up, the connection still opens, and the next caller uses it.
        let opening = tokio::spawn(Arc::clone(self).open(permit));
        opening.await.unwrap_or(Err(sqlx::Error::PoolClosed))
    }

    /// Opens a connection. While the server is starting, it retries for as long as a caller may wait.
    async fn open(self: Arc<Self>, permit: OwnedSemaphorePermit) -> Result<Connection, sqlx::Error> {
        let deadline = Instant::now() + self.acquire_timeout;
        let mut pause = Duration::from_millis(10);
        loop {
            let opened = timeout(CONNECT_TIMEOUT, OpenConnection::open(&self.options)).await;
            match opened.unwrap_or_else(|_| Err(timed_out(CONNECT_TIMEOUT))) {
                Ok(open) => return Ok(Connection::new(self, open, permit)),
                Err(error) if is_starting(&error) && Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(self.acquire_timeout / 5);
                }
                Err(error) => return Err(with_address(&self.options, error)),
            }
        }
    }

    /// Makes a connection idle whose last response was read completely.
    fn release(&self, open: OpenConnection, permit: OwnedSemaphorePermit) {
        if !self.permits.is_closed() && open.opened_at.elapsed() < MAX_LIFETIME {
            let mut idle = self.idle();
            idle.retain(|idle| idle.idle_since.elapsed() < IDLE_TIMEOUT);
            idle.push(IdleConnection { open, idle_since: Instant::now() });
        }
        // The permit is dropped last, so that the next caller that gets the permit finds the idle connection.
        drop(permit);
    }

    /// Ends an abandoned statement. The connection keeps its permit until the server confirms the end.
    async fn recover(self: Arc<Self>, mut open: OpenConnection, permit: OwnedSemaphorePermit, is_in_transaction: bool) {
        let cancelled = timeout(CANCEL_TIMEOUT, self.cancel_pool.as_ref().unwrap_or(&self).cancel(&open)).await;
        // A commit that waits for a standby is not cancelled: a cancel would make it visible before it is replicated.
        let end_timeout = if matches!(cancelled, Ok(Ok(false))) { STANDBY_TIMEOUT } else { CANCEL_TIMEOUT };
        let ended = timeout(end_timeout, async {
            match open.connection.ping().await {
                // 57014, query_canceled: the unread response of the cancelled statement.
                Err(error) if error.as_database_error().and_then(|error| error.code()).as_deref() == Some("57014") => {
                    open.connection.ping().await?;
                }
                pinged => pinged?,
            }
            if is_in_transaction {
                query("rollback").execute(&mut open.connection).await?;
            }
            Ok::<(), sqlx::Error>(())
        });
        match ended.await {
            Ok(Ok(())) => self.release(open, permit),
            // The server did not answer on this connection: close it.
            Ok(Err(_)) | Err(_) => drop((open, permit)),
        }
    }

    /// Cancels the statement of a connection. `false`: its backend is gone, or waits for a standby and must not be cancelled.
    async fn cancel(self: &Arc<Self>, open: &OpenConnection) -> Result<bool, sqlx::Error> {
        let Ok(mut connection) = self.acquire().await else {
            // No cancel request was sent, so none can arrive late. The statement ends by its own `statement_timeout`.
            return Ok(true);
        };
        // It completes before the cancelled connection is used again, so the signal cannot hit that connection's next statement.
        let cancelling = query_scalar::<_, bool>(
            "select pg_cancel_backend(pid) from pg_stat_activity
             where pid = $1 and extract(epoch from backend_start)::text = $2 and wait_event is distinct from 'SyncRep'",
        );
        let cancelled = cancelling.bind(open.backend_pid).bind(&open.backend_started_at).fetch_optional(&mut *connection).await?;
        connection.release();
        Ok(cancelled.is_some())
    }

    async fn close(&self) {
        self.permits.close();
        // Connections in use are released when their calls end.
        while self.permits.available_permits() < self.max_connections as usize {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let idle = std::mem::take(&mut *self.idle());
        for idle in idle {
            let _ = idle.open.connection.close().await;
        }
    }
}

/// Adds the server's host and port to an error of the connection. It keeps the kind of the error.
pub(super) fn with_address(options: &PgConnectOptions, error: sqlx::Error) -> sqlx::Error {
    let address = match options.get_socket() {
        Some(directory) => directory.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    };
    match error {
        sqlx::Error::Io(error) => {
            sqlx::Error::Io(std::io::Error::new(error.kind(), format!("no connection to PostgreSQL at {address}: {error}")))
        }
        error => error,
    }
}

/// Whether a retry soon may succeed: PostgreSQL is starting, or has too many connections for the moment.
fn is_starting(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        // 57P03: cannot_connect_now. 53300: too_many_connections (PostgreSQL, appendix A).
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

impl OpenConnection {
    async fn open(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let mut connection = PgConnection::connect_with(options).await?;
        let backend = "select pid, extract(epoch from backend_start)::text from pg_stat_activity where pid = pg_backend_pid()";
        let row = raw_sql(backend).fetch_one(&mut connection).await?;
        Ok(Self { backend_pid: row.try_get(0)?, backend_started_at: row.try_get(1)?, connection, opened_at: Instant::now() })
    }
}

/// Runs all database work of one store function within `limit`.
pub(super) async fn with_timeout<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, super::Error>>,
) -> Result<T, super::Error> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(timed_out(limit).into()))
}

impl Connection {
    fn new(pool: Arc<ConnectionPool>, open: OpenConnection, permit: OwnedSemaphorePermit) -> Self {
        Self { inner: Some((open, permit)), pool, is_used: false, is_in_transaction: false }
    }

    /// Returns the connection to the pool. Its last response must have been read completely.
    pub(super) fn release(mut self) {
        if let Some((open, permit)) = self.inner.take() {
            self.pool.release(open, permit);
        }
    }

    /// Closes a broken connection and returns its permit.
    fn discard(mut self) -> OwnedSemaphorePermit {
        let (_, permit) = self.inner.take().expect("it is set until the connection is released");
        permit
    }
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.inner.as_ref().expect("it is set until the connection is released").0.connection
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.is_used = true;
        &mut self.inner.as_mut().expect("it is set until the connection is released").0.connection
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some((open, permit)) = self.inner.take() else { return };
        if !self.is_used {
            self.pool.release(open, permit);
        } else if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(Arc::clone(&self.pool).recover(open, permit, self.is_in_transaction));
        }
    }
}

impl Transaction {
    pub(super) async fn commit(mut self) -> Result<(), sqlx::Error> {
        query("commit").execute(&mut *self.0).await?;
        self.0.release();
        Ok(())
    }

    pub(super) async fn rollback(mut self) -> Result<(), sqlx::Error> {
        query("rollback").execute(&mut *self.0).await?;
        self.0.release();
        Ok(())
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.0
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}

/// Whether the server sent a complete response, a result or an error. Only then can the connection be used again.
fn was_answered<T>(outcome: &Result<T, sqlx::Error>) -> bool {
    match outcome {
        // The server closes the connection after an error of class 57 (operator intervention), except a cancelled statement.
        Err(sqlx::Error::Database(error)) => {
            error.code().is_none_or(|code| code == "57014" || !(code.starts_with("57") || code.starts_with("08")))
        }
        Ok(_) | Err(sqlx::Error::RowNotFound) => true,
        Err(_) => false,
    }
}

/// Runs one statement on its own connection, within the pool's timeout.
macro_rules! with_timeout {
    ($pool:expr, $connection:ident => $work:expr) => {{
        let pool = $pool.clone();
        async move {
            let work = async {
                let mut $connection = pool.acquire().await?;
                let outcome = $work.await;
                if was_answered(&outcome) {
                    $connection.release();
                }
                outcome
            };
            timeout(pool.call_timeout, work).await.unwrap_or_else(|_| Err(timed_out(pool.call_timeout)))
        }
    }};
}

impl<'p> Executor<'p> for &'_ Pool {
    type Database = Postgres;

    /// Reads all rows before it returns the first: no statement here asks for more rows than fit in memory.
    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let rows = with_timeout!(self, connection => (&mut *connection).fetch_many(query).try_collect::<Vec<_>>());
        stream::once(rows).map_ok(|rows| stream::iter(rows.into_iter().map(Ok))).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(with_timeout!(self, connection => (&mut *connection).fetch_optional(query)))
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'p: 'e,
    {
        Box::pin(with_timeout!(self, connection => (&mut *connection).prepare_with(sql, parameters)))
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Postgres>, sqlx::Error>>
    where
        'p: 'e,
    {
        Box::pin(with_timeout!(self, connection => (&mut *connection).describe(sql)))
    }
}
