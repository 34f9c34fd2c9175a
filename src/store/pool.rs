//! Connections that are never waited for without end, and never more than the settings say.
//!
//! Every call ends after a time. A caller that gives up does not leave a statement behind: the statement is cancelled,
//! and its connection keeps its place in the pool until the server has confirmed that. Requests and workers have pools
//! of their own, so that neither takes the other's connections; a connection's `statement_timeout` is what its callers wait.

use std::ops::{Deref, DerefMut};
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

/// A worker's batch may take longer; nobody waits for it with a stop-watch.
pub(super) const WORK_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection may take to open. Longer than a caller waits: what a busy server opens late serves the next one,
/// and is not begun again and again.
const CONNECT_WITHIN: Duration = Duration::from_secs(4);
/// How long a server may take to confirm that a cancelled statement has ended. It takes milliseconds; a server that is
/// silent has ended the statement by its own `statement_timeout` when this is over.
const CANCEL_WITHIN: Duration = Duration::from_secs(2);
/// How long a commit may wait for a synchronous standby before its connection is given up.
const STANDBY_WITHIN: Duration = Duration::from_secs(60);
/// Closing says goodbye to the server, which may not be there.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// A connection that rested longer is asked whether it still works: the server may have been restarted.
const RESTED: Duration = Duration::from_secs(1);
/// Connections that nobody needed for so long are closed when the next one comes back.
const IDLE: Duration = Duration::from_secs(600);
/// Older connections are replaced: a server's process grows with what it has seen.
const LIFETIME: Duration = Duration::from_secs(1800);

/// The pools of a store; cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    connections: Arc<Connections>,
    /// How long one call may hold its caller.
    answer_within: Duration,
    /// The same database for workers; the workers' own pool has none.
    work: Option<Arc<Pool>>,
}

struct Connections {
    options: PgConnectOptions,
    acquire_within: Duration,
    most: u32,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Idle>>,
    /// Where statements are cancelled that callers left behind; `None`: here.
    cancels: Option<Arc<Connections>>,
}

struct Live {
    connection: PgConnection,
    /// The server's process, and when it began: a process of another server, or a later one, may have the same number.
    pid: i32,
    started: String,
    opened: Instant,
}

struct Idle {
    live: Live,
    since: Instant,
}

/// A connection on loan. Unless it is given back, what it was doing is cancelled.
pub(super) struct Lent {
    /// With its place in the pool; there until it is given back.
    held: Option<(Live, OwnedSemaphorePermit)>,
    connections: Arc<Connections>,
    is_used: bool,
    is_in_transaction: bool,
}

/// A transaction. Unless it is committed it is rolled back.
pub(super) struct Tx(Lent);

fn late(after: Duration) -> sqlx::Error {
    let words = format!("no answer within {} ms", after.as_millis());
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))
}

// `Executor` asks for it. Nothing of it is worth reading, and the options hold a password.
impl std::fmt::Debug for Pool {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pool").finish_non_exhaustive()
    }
}

impl Pool {
    /// Pools of `most` connections together. They are opened when they are first needed.
    pub(super) fn new(options: &PgConnectOptions, most: u32, answer_within: Duration) -> Self {
        let for_work = (most / 4).max(1);
        let work = Connections::new(options, for_work, WORK_WITHIN, None);
        let requests = Connections::new(options, most.saturating_sub(for_work).max(1), answer_within, Some(Arc::clone(&work)));
        let work = Self { connections: work, answer_within: WORK_WITHIN, work: None };
        Self { connections: requests, answer_within, work: Some(Arc::new(work)) }
    }

    /// Runs one verb's work on the database, all of it, within the time that a caller waits.
    pub(super) async fn in_time<T>(&self, work: impl Future<Output = Result<T, super::Error>>) -> Result<T, super::Error> {
        within(self.answer_within, work).await
    }

    /// For workers, and for what an operator waits for: statements here may take [`WORK_WITHIN`].
    pub(super) fn unbounded(&self) -> &Self {
        self.work.as_deref().unwrap_or(self)
    }

    pub(super) async fn lend(&self) -> Result<Lent, sqlx::Error> {
        self.connections.lend().await
    }

    pub(super) async fn begin(&self) -> Result<Tx, sqlx::Error> {
        let mut lent = self.lend().await?;
        lent.is_in_transaction = true;
        query("begin").execute(&mut *lent).await?;
        Ok(Tx(lent))
    }

    pub(super) async fn close(&self) {
        // Whoever closes is about to end: a connection that hangs ends with it.
        let _ = timeout(CLOSE_WITHIN, async {
            self.connections.close().await;
            self.unbounded().connections.close().await;
        })
        .await;
    }
}

impl Connections {
    fn new(options: &PgConnectOptions, most: u32, within: Duration, cancels: Option<Arc<Self>>) -> Arc<Self> {
        let options = options.clone().options([("statement_timeout", format!("{}ms", within.as_millis()))]);
        Arc::new(Self {
            options,
            // Shorter than what a caller waits in all, so that the log tells a full pool from a silent server.
            acquire_within: within.mul_f64(0.9),
            most,
            permits: Arc::new(Semaphore::new(most as usize)),
            idle: Mutex::default(),
            cancels,
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn lend(self: &Arc<Self>) -> Result<Lent, sqlx::Error> {
        timeout(self.acquire_within, self.lend_some()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
    }

    async fn lend_some(self: &Arc<Self>) -> Result<Lent, sqlx::Error> {
        let mut permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| sqlx::Error::PoolClosed)?;
        loop {
            // The one that rested shortest: those that are not needed grow old.
            let Some(idle) = self.idle().pop() else { break };
            let mut lent = Lent::new(Arc::clone(self), idle.live, permit);
            if idle.since.elapsed() < RESTED || lent.ping().await.is_ok() {
                lent.is_used = false;
                return Ok(lent);
            }
            permit = lent.discard();
        }
        // A task of its own: whoever wants the connection may give up, and the next one finds it open.
        let opening = tokio::spawn(Arc::clone(self).open(permit));
        opening.await.unwrap_or(Err(sqlx::Error::PoolClosed))
    }

    /// Opens a connection. A server that is just starting is asked again for as long as a caller may wait.
    async fn open(self: Arc<Self>, permit: OwnedSemaphorePermit) -> Result<Lent, sqlx::Error> {
        let deadline = Instant::now() + self.acquire_within;
        let mut pause = Duration::from_millis(10);
        loop {
            match timeout(CONNECT_WITHIN, Live::open(&self.options)).await.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
                Ok(live) => return Ok(Lent::new(self, live, permit)),
                Err(error) if is_starting(&error) && Instant::now() + pause < deadline => {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(self.acquire_within / 5);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes a connection back whose last answer came whole.
    fn take_back(&self, live: Live, permit: OwnedSemaphorePermit) {
        if !self.permits.is_closed() && live.opened.elapsed() < LIFETIME {
            let mut idle = self.idle();
            idle.retain(|idle| idle.since.elapsed() < IDLE);
            idle.push(Idle { live, since: Instant::now() });
        }
        // After it: whoever gets the permit finds the connection.
        drop(permit);
    }

    /// Ends what a caller left behind. The connection keeps its permit until the server says that it has ended.
    async fn recover(self: Arc<Self>, mut live: Live, permit: OwnedSemaphorePermit, is_in_transaction: bool) {
        let cancelled = timeout(CANCEL_WITHIN, self.cancels.as_ref().unwrap_or(&self).cancel(&live)).await;
        // A commit that waits for a standby is not cancelled: it would become visible before it is safe.
        let patience = if matches!(cancelled, Ok(Ok(false))) { STANDBY_WITHIN } else { CANCEL_WITHIN };
        let ended = timeout(patience, async {
            match live.connection.ping().await {
                // 57014, query_canceled: the statement's own end, which nobody has read yet.
                Err(error) if error.as_database_error().and_then(|error| error.code()).as_deref() == Some("57014") => {
                    live.connection.ping().await?;
                }
                pinged => pinged?,
            }
            if is_in_transaction {
                query("rollback").execute(&mut live.connection).await?;
            }
            Ok::<(), sqlx::Error>(())
        });
        match ended.await {
            Ok(Ok(())) => self.take_back(live, permit),
            // The server does not answer, or not to us any more.
            Ok(Err(_)) | Err(_) => drop((live, permit)),
        }
    }

    /// Cancels what a process of the server works on; `false` where it is not to be cancelled, or is gone.
    async fn cancel(self: &Arc<Self>, live: &Live) -> Result<bool, sqlx::Error> {
        let Ok(mut lent) = self.lend().await else {
            // Nothing was sent, so nothing can arrive late: the statement ends by its own time-out.
            return Ok(true);
        };
        // Sent before the connection is used for anything else, so that the signal cannot hit its next statement.
        let cancelling = query_scalar::<_, bool>(
            "select pg_cancel_backend(pid) from pg_stat_activity
             where pid = $1 and extract(epoch from backend_start)::text = $2 and wait_event is distinct from 'SyncRep'",
        );
        let cancelled = cancelling.bind(live.pid).bind(&live.started).fetch_optional(&mut *lent).await?;
        lent.give_back();
        Ok(cancelled.is_some())
    }

    async fn close(&self) {
        self.permits.close();
        // What is on loan comes back in its own time.
        while self.permits.available_permits() < self.most as usize {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let idle = std::mem::take(&mut *self.idle());
        for idle in idle {
            let _ = idle.live.connection.close().await;
        }
    }
}

/// Whether the server is about to be there: PostgreSQL starts, or has too many connections for a moment.
fn is_starting(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        // 57P03: cannot_connect_now. 53300: too_many_connections (PostgreSQL, appendix A).
        sqlx::Error::Database(error) => matches!(error.code().as_deref(), Some("57P03" | "53300")),
        _ => false,
    }
}

impl Live {
    async fn open(options: &PgConnectOptions) -> Result<Self, sqlx::Error> {
        let mut connection = PgConnection::connect_with(options).await?;
        let process = "select pid, extract(epoch from backend_start)::text from pg_stat_activity where pid = pg_backend_pid()";
        let row = raw_sql(process).fetch_one(&mut connection).await?;
        Ok(Self { pid: row.try_get(0)?, started: row.try_get(1)?, connection, opened: Instant::now() })
    }
}

/// Runs one verb's work on the database, all of it, within a time.
pub(super) async fn within<T>(time: Duration, work: impl Future<Output = Result<T, super::Error>>) -> Result<T, super::Error> {
    timeout(time, work).await.unwrap_or_else(|_| Err(late(time).into()))
}

impl Lent {
    fn new(connections: Arc<Connections>, live: Live, permit: OwnedSemaphorePermit) -> Self {
        Self { held: Some((live, permit)), connections, is_used: false, is_in_transaction: false }
    }

    /// Gives the connection back: its last answer came whole.
    pub(super) fn give_back(mut self) {
        if let Some((live, permit)) = self.held.take() {
            self.connections.take_back(live, permit);
        }
    }

    /// Closes the connection, which does not work any more, and gives its place.
    fn discard(mut self) -> OwnedSemaphorePermit {
        let (_, permit) = self.held.take().expect("it is there until it is given back");
        permit
    }
}

impl Deref for Lent {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.held.as_ref().expect("it is there until it is given back").0.connection
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.is_used = true;
        &mut self.held.as_mut().expect("it is there until it is given back").0.connection
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some((live, permit)) = self.held.take() else { return };
        if !self.is_used {
            self.connections.take_back(live, permit);
        } else if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(Arc::clone(&self.connections).recover(live, permit, self.is_in_transaction));
        }
    }
}

impl Tx {
    pub(super) async fn commit(mut self) -> Result<(), sqlx::Error> {
        query("commit").execute(&mut *self.0).await?;
        self.0.give_back();
        Ok(())
    }

    pub(super) async fn rollback(mut self) -> Result<(), sqlx::Error> {
        query("rollback").execute(&mut *self.0).await?;
        self.0.give_back();
        Ok(())
    }
}

impl Deref for Tx {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.0
    }
}

impl DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}

/// Whether the server answered, be it with an error: then the connection is in order.
fn was_answered<T>(outcome: &Result<T, sqlx::Error>) -> bool {
    match outcome {
        // Of class 57 the server says goodbye with an error, except where it cancelled a statement.
        Err(sqlx::Error::Database(error)) => {
            error.code().is_none_or(|code| code == "57014" || !(code.starts_with("57") || code.starts_with("08")))
        }
        Ok(_) | Err(sqlx::Error::RowNotFound) => true,
        Err(_) => false,
    }
}

/// One statement on a connection of its own.
macro_rules! single {
    ($pool:expr, $lent:ident => $work:expr) => {{
        let pool = $pool.clone();
        async move {
            let work = async {
                let mut $lent = pool.lend().await?;
                let outcome = $work.await;
                if was_answered(&outcome) {
                    $lent.give_back();
                }
                outcome
            };
            timeout(pool.answer_within, work).await.unwrap_or_else(|_| Err(late(pool.answer_within)))
        }
    }};
}
impl<'p> Executor<'p> for &'_ Pool {
    type Database = Postgres;

    /// Reads all rows before it gives the first: no statement here asks for more than fit in memory.
    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        let rows = single!(self, lent => (&mut *lent).fetch_many(query).try_collect::<Vec<_>>());
        stream::once(rows).map_ok(|rows| stream::iter(rows.into_iter().map(Ok))).try_flatten().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        'p: 'e,
        E: 'q + Execute<'q, Postgres>,
    {
        Box::pin(single!(self, lent => (&mut *lent).fetch_optional(query)))
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'p: 'e,
    {
        Box::pin(single!(self, lent => (&mut *lent).prepare_with(sql, parameters)))
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<Describe<Postgres>, sqlx::Error>>
    where
        'p: 'e,
    {
        Box::pin(single!(self, lent => (&mut *lent).describe(sql)))
    }
}
