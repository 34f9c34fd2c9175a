//! Connections that are never waited for without end.
//!
//! PostgreSQL's own time-outs end what the server works on, but a server that is gone without a word answers nothing:
//! here every call has an end, and a connection whose answer did not come is dropped, so that the pool cannot fill
//! with dead ones.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgQueryResult, PgRow, PgStatement, PgTypeInfo};
use sqlx::{Describe, Either, Execute, Executor, PgConnection, PgPool, Postgres, SqlStr, query};
use tokio::time::timeout;

/// A worker's batch may take longer; nobody waits for it with a stop-watch.
pub(super) const WORK_WITHIN: Duration = Duration::from_secs(10);
/// A connection that is given back must answer once more within this.
const RETURN_WITHIN: Duration = Duration::from_secs(2);
/// Closing says goodbye to the server, which may not be there.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// The pool; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    connections: PgPool,
    /// How long one call may hold its caller.
    answer_within: Duration,
}

/// A connection on loan. Unless it is given back it is closed: what it was doing may still be under way.
#[derive(Debug)]
pub(super) struct Lent(Option<PoolConnection<Postgres>>);

/// A transaction. Unless it is committed or rolled back its connection is closed, which rolls it back.
#[derive(Debug)]
pub(super) struct Tx(Lent);

fn late(after: Duration) -> sqlx::Error {
    let words = format!("no answer within {} ms", after.as_millis());
    sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))
}

impl Pool {
    pub(super) fn new(connections: PgPool, answer_within: Duration) -> Self {
        Self { connections, answer_within }
    }

    /// Runs one verb's work on the database, all of it, within the time that a caller waits.
    pub(super) async fn in_time<T>(&self, work: impl Future<Output = Result<T, super::Error>>) -> Result<T, super::Error> {
        within(self.answer_within, work).await
    }

    /// Without bounds, for what an operator waits for.
    pub(super) fn unbounded(&self) -> &PgPool {
        &self.connections
    }

    pub(super) async fn lend(&self) -> Result<Lent, sqlx::Error> {
        Ok(Lent(Some(self.connections.acquire().await?)))
    }

    pub(super) async fn begin(&self) -> Result<Tx, sqlx::Error> {
        let mut lent = self.lend().await?;
        query("begin").execute(&mut *lent).await?;
        Ok(Tx(lent))
    }

    pub(super) async fn close(&self) {
        // Whoever closes is about to end: a connection that hangs ends with it.
        let _ = timeout(CLOSE_WITHIN, self.connections.close()).await;
    }
}

/// Runs one verb's work on the database, all of it, within a time.
pub(super) async fn within<T>(time: Duration, work: impl Future<Output = Result<T, super::Error>>) -> Result<T, super::Error> {
    timeout(time, work).await.unwrap_or_else(|_| Err(late(time).into()))
}

impl Lent {
    /// Gives the connection back: its last answer came whole.
    pub(super) fn give_back(mut self) {
        if let Some(mut connection) = self.0.take() {
            // The pool would ask the connection once more, and wait for ever.
            tokio::spawn(timeout(RETURN_WITHIN, connection.return_to_pool()));
        }
    }
}

impl Deref for Lent {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.0.as_ref().expect("it is there until it is given back")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect("it is there until it is given back")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
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
    matches!(outcome, Ok(_) | Err(sqlx::Error::Database(_) | sqlx::Error::RowNotFound))
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
