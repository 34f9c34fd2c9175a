//! For the audit: reads all sessions in order of id, and queues a pointer again that is missing from the outbox.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::row::{Row, session_rows};
use super::write::enqueue_pointer;
use crate::session::{Session, State, ordering_key};
use crate::store::pool::{WORKER_TIMEOUT, with_timeout};
use crate::store::{Error, Store};

/// A session found by a scan over all sessions.
pub(crate) struct ScannedSession {
    pub(crate) id: Uuid,
    /// The session, or why its row is corrupt.
    pub(crate) session: Result<Session, Error>,
    /// Whether the sweeper will still clean up its S3 objects.
    pub(crate) cleanup_due: bool,
    pub(crate) size_bytes: i64,
}

impl Store {
    /// Sessions after this one in order of id, which is roughly the order in which they were opened.
    pub(crate) async fn scan(&self, after: Uuid, limit: i64) -> Result<Vec<ScannedSession>, Error> {
        let rows = session_rows!("select ", " from upload_sessions where id > $1 order by id limit $2", after, limit);
        let rows = with_timeout(WORKER_TIMEOUT, async { Ok(rows.fetch_all(self.pool.worker_pool()).await?) }).await?;
        Ok(rows
            .into_iter()
            .map(|row| ScannedSession {
                id: row.id,
                size_bytes: row.size_bytes,
                cleanup_due: row.cleanup_due_at.is_some(),
                session: Session::try_from(row),
            })
            .collect())
    }

    /// Inserts a verified session's stored pointer into the outbox if it is missing there. `false`: nothing was to do.
    pub(crate) async fn requeue_pointer(&self, id: Uuid, now: OffsetDateTime) -> Result<bool, Error> {
        let shards = self.deployment().await?.shards;
        let Some(session) = self.session(id).await? else { return Ok(false) };
        with_timeout(WORKER_TIMEOUT, async {
            let mut tx = self.pool.worker_pool().begin().await?;
            // The same lock as in `save`: the outbox numbers of one key must follow the order of commit.
            if let Some(ordering) = ordering_key(&session.spec.topic, session.spec.key.as_deref()) {
                query!("select pg_advisory_xact_lock($1)", ordering).execute(&mut *tx).await?;
            }
            let row = session_rows!("select ", " from upload_sessions where id = $1 and state = 'verified' for update", id);
            let session = row.fetch_optional(&mut *tx).await?.map(Session::try_from).transpose()?;
            let is_in_outbox =
                query_scalar!(r#"select exists (select from outbox where session_id = $1) as "is_in_outbox!""#, id);
            let is_in_outbox = is_in_outbox.fetch_one(&mut *tx).await?;
            match session {
                Some(session) if !is_in_outbox && matches!(session.state, State::Verified(_)) => {
                    enqueue_pointer(&mut tx, &session, shards, now).await?;
                    tx.commit().await?;
                    Ok(true)
                }
                _ => {
                    tx.rollback().await?;
                    Ok(false)
                }
            }
        })
        .await
    }
}
