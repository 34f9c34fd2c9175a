//! Lists of sessions, newest first. Every list walks an index and looks at a bounded number of its entries.
//!
//! A filter that has no index of its own is applied to what the walk meets. Such a walk ends after [`LOOKED_AT`] entries,
//! and the page says where the next one begins: whatever the filter, a page costs about the same at any size of the table.

use sqlx::query_as;
use time::macros::datetime;
use time::{OffsetDateTime, PrimitiveDateTime};
use uuid::Uuid;

use super::row::{Row, rows};
use super::{Filter, Page};
use crate::session::Session;
use crate::store::{Error, Store};

/// Entries that one page looks at: 5,000 rows that are read from disk one by one are still read in time.
const LOOKED_AT: i64 = 5000;
/// Tokens with more exact topics than this are filtered like tokens with wildcards: each topic costs a look into an index.
const MOST_TOPICS: usize = 64;
/// Before every session there is.
const OLDEST: PrimitiveDateTime = datetime!(0000-01-01 00:00);
/// After every session there is.
const NEWEST: PrimitiveDateTime = datetime!(9999-12-31 00:00);

/// A page of sessions, and where the next one begins; `None` at the end.
pub(crate) struct Listed {
    pub(crate) sessions: Vec<Session>,
    pub(crate) next: Page,
}

/// The index that a list walks.
enum Walk<'a> {
    /// Everybody's sessions.
    All,
    /// A tenant's sessions.
    Tenant(&'a str),
    /// A tenant's sessions of each of these topics.
    Topics(&'a str, Vec<String>),
    /// A tenant's sessions in each of these states, none of which is `published`.
    States(&'a str, Vec<String>),
    /// Everybody's sessions in each of these states, none of which is `published`.
    StatesOfAll(Vec<String>),
}

/// The part of the walk that a page covers: from `from` on, without `to`, by (`created_at`, `id`).
struct Span {
    from: (OffsetDateTime, Uuid),
    to: (OffsetDateTime, Uuid),
}

#[derive(Debug)]
struct Position {
    created_at: OffsetDateTime,
    id: Uuid,
}

/// One page of a walk. `$walk` narrows the rows by an index; what the filter asks besides is asked of every row in the span.
macro_rules! page {
    ($store:expr, $span:expr, $filter:expr, $limit:expr, $source:literal, $walk:literal $(, $argument:expr)*) => {{
        let (names, prefixes) = $filter.topics.clone().unzip();
        rows!(
            "select ",
            [" from " + $source + " (select * from upload_sessions where " + $walk +
             " and (created_at, id) >= ($1, $2::uuid) and (created_at, id) < ($3, $4::uuid)
               and ($5::text is null or topic = $5)
               and (cardinality($6::text[]) = 0 or state = any($6))
               and ($7::bytea is null or substring(record_key from 1 for octet_length($7)) = $7)
               and ($8::text[] is null or topic = any($8) or topic ^@ any($9::text[]))
               order by created_at desc, id desc limit $10) met
             order by created_at desc, id desc limit $10"],
            $span.from.0, $span.from.1, $span.to.0, $span.to.1, $filter.topic, &$filter.states, $filter.key_prefix,
            names.as_deref(), prefixes.as_deref(), $limit $(, $argument)*
        )
        .fetch_all(&$store.pool)
        .await?
    }};
}

/// The entry that a walk of the same span ends before, if it is longer than what a page looks at.
macro_rules! end {
    ($store:expr, $span:expr, $branches:expr, $source:literal, $walk:literal $(, $argument:expr)*) => {
        query_as!(
            Position,
            r#"select met.created_at as "created_at!", met.id as "id!" from "# + $source
                + " (select created_at, id from upload_sessions where " + $walk
                + " and (created_at, id) >= ($1, $2::uuid) and (created_at, id) < ($3, $4::uuid)
                    order by created_at desc, id desc offset $5 limit 1) met
                  order by met.created_at desc, met.id desc limit 1",
            $span.from.0, $span.from.1, $span.to.0, $span.to.1, (LOOKED_AT / $branches - 1).max(0) $(, $argument)*
        )
        .fetch_optional(&$store.pool)
        .await?
    };
}

impl Filter {
    /// The index that leaves the least to be looked at.
    fn walk(&self) -> Walk<'_> {
        let unpublished = !self.states.is_empty() && self.states.iter().all(|state| state != "published");
        let Some(tenant) = &self.tenant else {
            return if unpublished { Walk::StatesOfAll(self.states.clone()) } else { Walk::All };
        };
        if unpublished {
            return Walk::States(tenant, self.states.clone());
        }
        match (&self.topic, &self.topics) {
            (Some(topic), _) => Walk::Topics(tenant, vec![topic.clone()]),
            (None, Some((names, prefixes))) if prefixes.is_empty() && names.len() <= MOST_TOPICS => {
                Walk::Topics(tenant, distinct(names))
            }
            _ => Walk::Tenant(tenant),
        }
    }

    /// Whether rows that the walk meets may be passed over.
    fn is_residual(&self, walk: &Walk<'_>) -> bool {
        let topics = self.topic.is_some() || self.topics.is_some();
        let beside = match walk {
            Walk::Topics(..) => !self.states.is_empty(),
            Walk::All | Walk::Tenant(_) => topics || !self.states.is_empty(),
            Walk::States(..) | Walk::StatesOfAll(_) => topics,
        };
        beside || self.key_prefix.is_some()
    }

    fn span(&self, page: Page) -> Span {
        let from = (self.created_after.unwrap_or(OLDEST.assume_utc()), Uuid::nil());
        let before = (self.created_before.unwrap_or(NEWEST.assume_utc()), Uuid::nil());
        Span { from, to: page.map_or(before, |page| page.min(before)) }
    }
}

/// How many walks of an index there are beside each other: together they look at what one may.
fn branches(walked: &[String]) -> i64 {
    i64::try_from(walked.len()).unwrap_or(i64::MAX).max(1)
}

fn distinct(texts: &[String]) -> Vec<String> {
    texts.iter().cloned().collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

impl Store {
    /// A page of at most `limit` sessions, newest first. It may be short or empty and not the last one.
    pub(crate) async fn list(&self, filter: &Filter, page: Page, limit: usize) -> Result<Listed, Error> {
        let listing = async {
            // Administrators take turns too, as if they were a tenant.
            let _turn = self.turns.wait(filter.tenant.as_deref().unwrap_or_default()).await;
            self.list_page(filter, page, limit).await
        };
        self.pool.in_time(listing).await
    }

    async fn list_page(&self, filter: &Filter, page: Page, limit: usize) -> Result<Listed, Error> {
        let filter = Filter { states: distinct(&filter.states), ..filter.clone() };
        let (walk, mut span) = (filter.walk(), filter.span(page));
        // First, so that what opens meanwhile cannot move the end of a page that is read already.
        let end = if filter.is_residual(&walk) { self.end(&walk, &span).await? } else { None };
        if let Some(end) = end {
            span.from = end;
        }
        let more = i64::try_from(limit).expect("a page is small") + 1;
        let mut sessions = Vec::with_capacity(limit);
        for row in self.met(&walk, &span, &filter, more).await? {
            sessions.push(Session::try_from(row)?);
        }
        let next = if sessions.len() > limit {
            sessions.truncate(limit);
            sessions.last().map(|last| (last.created_at, last.id))
        } else {
            end
        };
        Ok(Listed { sessions, next })
    }

    /// What a page of the walk shows, and what is behind it.
    async fn met(&self, walk: &Walk<'_>, span: &Span, filter: &Filter, limit: i64) -> Result<Vec<Row>, Error> {
        // `version > 0` holds always. It lets a list over all tenants use the index that is meant for it, and no other do so.
        Ok(match walk {
            Walk::All => page!(self, span, filter, limit, "", "version > 0"),
            Walk::Tenant(tenant) => page!(self, span, filter, limit, "", "tenant = $11", tenant),
            Walk::Topics(tenant, topics) => page!(
                self,
                span,
                filter,
                limit,
                "unnest($12::text[]) as wanted cross join lateral",
                "tenant = $11 and topic = wanted",
                tenant,
                topics
            ),
            Walk::States(tenant, states) => page!(
                self,
                span,
                filter,
                limit,
                "unnest($12::text[]) as wanted cross join lateral",
                "tenant = $11 and state = wanted and state <> 'published'",
                tenant,
                states
            ),
            Walk::StatesOfAll(states) => page!(
                self,
                span,
                filter,
                limit,
                "unnest($11::text[]) as wanted cross join lateral",
                "state = wanted and state <> 'published'",
                states
            ),
        })
    }

    /// The last entry that a page looks at; `None` where the walk ends before.
    async fn end(&self, walk: &Walk<'_>, span: &Span) -> Result<Page, Error> {
        let end = match walk {
            Walk::All => end!(self, span, 1, "", "version > 0"),
            Walk::Tenant(tenant) => end!(self, span, 1, "", "tenant = $6", tenant),
            Walk::Topics(tenant, topics) => end!(
                self,
                span,
                branches(topics),
                "unnest($7::text[]) as wanted cross join lateral",
                "tenant = $6 and topic = wanted",
                tenant,
                topics
            ),
            Walk::States(tenant, states) => end!(
                self,
                span,
                branches(states),
                "unnest($7::text[]) as wanted cross join lateral",
                "tenant = $6 and state = wanted and state <> 'published'",
                tenant,
                states
            ),
            Walk::StatesOfAll(states) => end!(
                self,
                span,
                branches(states),
                "unnest($6::text[]) as wanted cross join lateral",
                "state = wanted and state <> 'published'",
                states
            ),
        };
        Ok(end.map(|end| (end.created_at, end.id)))
    }
}
