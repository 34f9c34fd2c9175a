//! Every session in the order of their ids, for the audit; and a pointer promised once more that the outbox lost.

use sqlx::{query, query_scalar};
use time::OffsetDateTime;
use uuid::Uuid;

use super::row::{Row, rows};
use super::write::promise_pointer;
use crate::session::{Session, State, ordering};
use crate::store::pool::{WORK_WITHIN, within};
use crate::store::{Error, Store};

/// A session on a walk through all of them.
pub(crate) struct Walked {
    pub(crate) id: Uuid,
    /// The session, or why its row cannot be one.
    pub(crate) session: Result<Session, Error>,
    /// The sweeper is still to come.
    pub(crate) cleanup_due: bool,
    pub(crate) size_bytes: i64,
}

impl Store {
    /// Sessions after this one, in the order of their ids, which is about that of their opening.
    pub(crate) async fn walk(&self, after: Uuid, limit: i64) -> Result<Vec<Walked>, Error> {
        let rows = rows!("select ", " from upload_sessions where id > $1 order by id limit $2", after, limit);
        let rows = within(WORK_WITHIN, async { Ok(rows.fetch_all(self.pool.unbounded()).await?) }).await?;
        Ok(rows
            .into_iter()
            .map(|row| Walked {
                id: row.id,
                size_bytes: row.size_bytes,
                cleanup_due: row.cleanup_due_at.is_some(),
                session: Session::try_from(row),
            })
            .collect())
    }

    /// Puts a verified session's pointer into the outbox, with the bytes that were promised, if it is not there.
    /// `false` when there is nothing to do.
    pub(crate) async fn promise_again(&self, id: Uuid, shards: i32, now: OffsetDateTime) -> Result<bool, Error> {
        let Some(session) = self.session(id).await? else { return Ok(false) };
        within(WORK_WITHIN, async {
            let mut tx = self.pool.unbounded().begin().await?;
            // As every promise: the numbers of one key are drawn one at a time, in the order of commit.
            if let Some(ordering) = ordering(&session.promise.topic, session.promise.key.as_deref()) {
                query!("select pg_advisory_xact_lock($1)", ordering).execute(&mut *tx).await?;
            }
            let row = rows!("select ", " from upload_sessions where id = $1 and state = 'verified' for update", id);
            let session = row.fetch_optional(&mut *tx).await?.map(Session::try_from).transpose()?;
            let waits = query_scalar!(r#"select exists (select from outbox where session_id = $1) as "waits!""#, id);
            let waits = waits.fetch_one(&mut *tx).await?;
            match session {
                Some(session) if !waits && matches!(session.state, State::Verified(_)) => {
                    promise_pointer(&mut tx, &session, shards, now).await?;
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
