//! Lists of sessions, newest first. Every list scans an index and reads a limited number of its entries.
//!
//! A filter without an index of its own is applied to the rows of the scan. Such a scan stops after [`MAX_SCANNED_ENTRIES`]
//! entries, and the page says where the next page begins. So a page costs about the same with every filter and table size.

use sqlx::query_as;
use time::macros::datetime;
use time::{OffsetDateTime, PrimitiveDateTime};
use uuid::Uuid;

use super::row::{Row, session_rows};
use super::{Cursor, Filter};
use crate::session::Session;
use crate::store::{Error, Store};

/// How many entries one page scans: reading 5,000 rows one by one from disk still meets the call timeout.
const MAX_SCANNED_ENTRIES: i64 = 5000;
/// With more exact topics than this, the topics are a residual filter as wildcards are: each topic costs an index scan.
const MAX_INDEXED_TOPICS: usize = 64;
/// Earlier than every session.
const OLDEST: PrimitiveDateTime = datetime!(0000-01-01 00:00);
/// Later than every session.
const NEWEST: PrimitiveDateTime = datetime!(9999-12-31 00:00);

/// A page of sessions, and where the next page begins; `None` after the last page.
pub(crate) struct SessionPage {
    pub(crate) sessions: Vec<Session>,
    pub(crate) next: Cursor,
}

/// The index that a list scans.
enum IndexScan<'a> {
    /// The sessions of all tenants.
    AllTenants,
    /// The sessions of one tenant.
    Tenant(&'a str),
    /// A tenant's sessions in each of these topics.
    Topics(&'a str, Vec<String>),
    /// A tenant's sessions in each of these states, none of which is `published`.
    States(&'a str, Vec<String>),
    /// The sessions of all tenants in each of these states, none of which is `published`.
    StatesOfAllTenants(Vec<String>),
}

/// The part of the scan that a page covers, by (`created_at`, `id`): it includes `from` and excludes `to`.
struct ScanRange {
    from: (OffsetDateTime, Uuid),
    to: (OffsetDateTime, Uuid),
}

#[derive(Debug)]
struct Entry {
    created_at: OffsetDateTime,
    id: Uuid,
}

/// Reads one page of a scan. `$condition` selects rows by an index; the rest of the filter is applied to every row in the range.
macro_rules! page {
    ($store:expr, $range:expr, $filter:expr, $limit:expr, $source:literal, $condition:literal $(, $argument:expr)*) => {{
        let (names, prefixes) = $filter.topics.clone().unzip();
        session_rows!(
            "select ",
            [" from " + $source + " (select * from upload_sessions where " + $condition +
             " and (created_at, id) >= ($1, $2::uuid) and (created_at, id) < ($3, $4::uuid)
               and ($5::text is null or topic = $5)
               and (cardinality($6::text[]) = 0 or state = any($6))
               and ($7::bytea is null or substring(record_key from 1 for octet_length($7)) = $7)
               and ($8::text[] is null or topic = any($8) or topic ^@ any($9::text[]))
               order by created_at desc, id desc limit $10) matched
             order by created_at desc, id desc limit $10"],
            $range.from.0, $range.from.1, $range.to.0, $range.to.1, $filter.topic, &$filter.states, $filter.key_prefix,
            names.as_deref(), prefixes.as_deref(), $limit $(, $argument)*
        )
        .fetch_all(&$store.pool)
        .await?
    }};
}

/// The last entry that a page may scan; `None` if the range has fewer entries than a page may scan.
macro_rules! last_scanned {
    ($store:expr, $range:expr, $branch_count:expr, $source:literal, $condition:literal $(, $argument:expr)*) => {
        query_as!(
            Entry,
            r#"select matched.created_at as "created_at!", matched.id as "id!" from "# + $source
                + " (select created_at, id from upload_sessions where " + $condition
                + " and (created_at, id) >= ($1, $2::uuid) and (created_at, id) < ($3, $4::uuid)
                    order by created_at desc, id desc offset $5 limit 1) matched
                  order by matched.created_at desc, matched.id desc limit 1",
            $range.from.0, $range.from.1, $range.to.0, $range.to.1,
            (MAX_SCANNED_ENTRIES / $branch_count - 1).max(0) $(, $argument)*
        )
        .fetch_optional(&$store.pool)
        .await?
    };
}

impl Filter {
    /// The index whose scan reads the fewest entries for this filter.
    fn index_scan(&self) -> IndexScan<'_> {
        let is_unpublished = !self.states.is_empty() && self.states.iter().all(|state| state != "published");
        let Some(tenant) = &self.tenant else {
            return if is_unpublished { IndexScan::StatesOfAllTenants(self.states.clone()) } else { IndexScan::AllTenants };
        };
        if is_unpublished {
            return IndexScan::States(tenant, self.states.clone());
        }
        match (&self.topic, &self.topics) {
            (Some(topic), _) => IndexScan::Topics(tenant, vec![topic.clone()]),
            (None, Some((names, prefixes))) if prefixes.is_empty() && names.len() <= MAX_INDEXED_TOPICS => {
                IndexScan::Topics(tenant, distinct(names))
            }
            _ => IndexScan::Tenant(tenant),
        }
    }

    /// Whether the filter may exclude rows that the scan reads.
    fn has_residual_filter(&self, scan: &IndexScan<'_>) -> bool {
        let topics = self.topic.is_some() || self.topics.is_some();
        let is_filtered = match scan {
            IndexScan::Topics(..) => !self.states.is_empty(),
            IndexScan::AllTenants | IndexScan::Tenant(_) => topics || !self.states.is_empty(),
            IndexScan::States(..) | IndexScan::StatesOfAllTenants(_) => topics,
        };
        is_filtered || self.key_prefix.is_some()
    }

    fn range(&self, cursor: Cursor) -> ScanRange {
        let from = (self.created_after.unwrap_or(OLDEST.assume_utc()), Uuid::nil());
        let before = (self.created_before.unwrap_or(NEWEST.assume_utc()), Uuid::nil());
        ScanRange { from, to: cursor.map_or(before, |cursor| cursor.min(before)) }
    }
}

/// How many index scans one page needs: together they may read as many entries as a single scan.
fn branch_count(scanned: &[String]) -> i64 {
    i64::try_from(scanned.len()).unwrap_or(i64::MAX).max(1)
}

fn distinct(texts: &[String]) -> Vec<String> {
    texts.iter().cloned().collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}

impl Store {
    /// A page of at most `limit` sessions, newest first. A short or empty page is not always the last one.
    pub(crate) async fn list(&self, filter: &Filter, cursor: Cursor, limit: usize) -> Result<SessionPage, Error> {
        let listing = async {
            // All lists over all tenants share one limit, as if they were one tenant's.
            let _permit = self.tenant_limiter.acquire(filter.tenant.as_deref().unwrap_or_default()).await;
            self.list_page(filter, cursor, limit).await
        };
        self.pool.with_timeout(listing).await
    }

    async fn list_page(&self, filter: &Filter, cursor: Cursor, limit: usize) -> Result<SessionPage, Error> {
        let filter = Filter { states: distinct(&filter.states), ..filter.clone() };
        let (scan, mut range) = (filter.index_scan(), filter.range(cursor));
        // Read before the page: a session that opens meanwhile must not shift the end of a page that is already read.
        let last_scanned = if filter.has_residual_filter(&scan) { self.last_scanned(&scan, &range).await? } else { None };
        if let Some(last_scanned) = last_scanned {
            range.from = last_scanned;
        }
        let limit_and_one = i64::try_from(limit).expect("a page is small") + 1;
        let mut sessions = Vec::with_capacity(limit);
        for row in self.page_rows(&scan, &range, &filter, limit_and_one).await? {
            sessions.push(Session::try_from(row)?);
        }
        let next = if sessions.len() > limit {
            sessions.truncate(limit);
            sessions.last().map(|last| (last.created_at, last.id))
        } else {
            last_scanned
        };
        Ok(SessionPage { sessions, next })
    }

    /// The rows of a page. The caller asks for one row more than it shows, to see whether another page follows.
    async fn page_rows(&self, scan: &IndexScan<'_>, range: &ScanRange, filter: &Filter, limit: i64) -> Result<Vec<Row>, Error> {
        // `version > 0` is always true. It matches the partial index for lists over all tenants, and no other statement says it.
        Ok(match scan {
            IndexScan::AllTenants => page!(self, range, filter, limit, "", "version > 0"),
            IndexScan::Tenant(tenant) => page!(self, range, filter, limit, "", "tenant = $11", tenant),
            IndexScan::Topics(tenant, topics) => page!(
                self,
                range,
                filter,
                limit,
                "unnest($12::text[]) as wanted cross join lateral",
                "tenant = $11 and topic = wanted",
                tenant,
                topics
            ),
            IndexScan::States(tenant, states) => page!(
                self,
                range,
                filter,
                limit,
                "unnest($12::text[]) as wanted cross join lateral",
                "tenant = $11 and state = wanted and state <> 'published'",
                tenant,
                states
            ),
            IndexScan::StatesOfAllTenants(states) => page!(
                self,
                range,
                filter,
                limit,
                "unnest($11::text[]) as wanted cross join lateral",
                "state = wanted and state <> 'published'",
                states
            ),
        })
    }

    /// The last entry that a page may scan; `None` where the scan ends earlier.
    async fn last_scanned(&self, scan: &IndexScan<'_>, range: &ScanRange) -> Result<Cursor, Error> {
        let last_scanned = match scan {
            IndexScan::AllTenants => last_scanned!(self, range, 1, "", "version > 0"),
            IndexScan::Tenant(tenant) => last_scanned!(self, range, 1, "", "tenant = $6", tenant),
            IndexScan::Topics(tenant, topics) => last_scanned!(
                self,
                range,
                branch_count(topics),
                "unnest($7::text[]) as wanted cross join lateral",
                "tenant = $6 and topic = wanted",
                tenant,
                topics
            ),
            IndexScan::States(tenant, states) => last_scanned!(
                self,
                range,
                branch_count(states),
                "unnest($7::text[]) as wanted cross join lateral",
                "tenant = $6 and state = wanted and state <> 'published'",
                tenant,
                states
            ),
            IndexScan::StatesOfAllTenants(states) => last_scanned!(
                self,
                range,
                branch_count(states),
                "unnest($6::text[]) as wanted cross join lateral",
                "state = wanted and state <> 'published'",
                states
            ),
        };
        Ok(last_scanned.map(|last_scanned| (last_scanned.created_at, last_scanned.id)))
    }
}
