//! A tenant or a topic with much work must not delay others.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{ApiResponse, TestBroker};

async fn open(broker: &TestBroker, bearer: &str) -> ApiResponse {
    let body = json!({"topic": broker.topic, "size": 1});
    broker.send(broker.request("POST", "/lfs/uploads").bearer_auth(bearer).json(&body)).await
}

#[tokio::test]
async fn requests_that_time_out_never_leave_more_connections_than_the_pool_has() {
    let broker = TestBroker::start_with(|settings| settings.store.max_connections = 4).await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    // Every statement on this table waits.
    let mut blocking = broker.db.begin().await.unwrap();
    sqlx::raw_sql("lock table upload_sessions in access exclusive mode").execute(&mut *blocking).await.unwrap();
    let path = format!("/lfs/uploads/{id}");
    let mut max_connections = 0;
    for _ in 0..8 {
        let url = format!("{}{path}", broker.url());
        let requests = (0..6).map(|_| broker.http.get(&url).timeout(Duration::from_millis(150)).send());
        let responses = futures_util::future::join_all(requests).await;
        assert!(responses.iter().all(Result::is_err), "every request times out");
        for _ in 0..5 {
            max_connections = max_connections.max(broker.backends("true").await);
        }
    }
    assert!((2..=4).contains(&max_connections), "{max_connections} connections of a pool of 4");
    // The table is still locked, so the statements have ended because they were cancelled.
    broker
        .eventually("no statement is left behind", || async {
            broker.backends("query like '%where id = $1' and state = 'active'").await == 0
        })
        .await;
    blocking.rollback().await.unwrap();
    broker.eventually("the broker answers again", || async { broker.get(&path).await.status == 200 }).await;
}

#[tokio::test]
async fn a_tenant_that_waits_for_its_own_row_leaves_connections_for_others() {
    let broker = TestBroker::start_with_tokens(|settings| {
        settings.store.max_connections = 8;
        settings.store.tenant_connections = 2;
    })
    .await;
    let (noisy, quiet) = (token("noisy", "lfs:write", &["*"]), token("quiet", "lfs:write", &["*"]));
    open(&broker, &noisy).await.expect(201);
    open(&broker, &quiet).await.expect(201);
    // As when PostgreSQL is slow to commit a transaction that changed the row.
    let mut blocking = broker.db.begin().await.unwrap();
    sqlx::query("select from tenants where tenant = 'noisy' for update").execute(&mut *blocking).await.unwrap();
    let waiting = futures_util::future::join_all((0..30).map(|_| open(&broker, &noisy)));
    let other_tenant = async {
        broker.eventually("the tenant waits", || async { broker.backends("wait_event_type = 'Lock'").await > 0 }).await;
        for _ in 0..10 {
            open(&broker, &quiet).await.expect(201);
            assert!(broker.backends("wait_event_type = 'Lock'").await <= 2);
        }
        blocking.rollback().await.unwrap();
    };
    let (waited, ()) = tokio::join!(waiting, other_tenant);
    assert!(waited.iter().all(|response| [201, 503].contains(&response.status)));
    assert!(waited.iter().any(|response| response.status == 201));
}

#[tokio::test]
async fn a_pointer_that_can_be_sent_waits_for_few_refused_ones() {
    let broker = TestBroker::start().await;
    broker.publish(b"first", json!({})).await;
    let fill = "with refused as (
            insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
                topic, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
                session_seconds, verified_at, integrity, pointer)
            select gen_random_uuid(), 'default', 's', 'verified', now(), now(), now(), now(), 'it-missing', 'text/plain', 1, 'none',
                'size', 'bucket', 'object-' || n, 'single', 'none', 900, 3600, now(), 'size', '{\"kfs_lfs\":1}'
            from generate_series(1, 4000) n returning id)
        insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
        select id, row_number() over () % 4, 'it-missing', '{\"kfs_lfs\":1}', '[]', now(), now(), 'kafka has no topic it-missing' from refused";
    sqlx::query(fill).execute(&broker.db).await.unwrap();
    for _ in 0..5 {
        broker.publish(b"hello", json!({})).await;
    }
    // The counters show that a batch retries at most 20 refused rows.
    let counts = "select (select sum(last_batch)::bigint from relay_shards), (select sum(attempts)::bigint from outbox)";
    let (batches, tried): (i64, i64) = sqlx::query_as(counts).fetch_one(&broker.db).await.unwrap();
    assert!(tried <= 20 * batches, "{batches} batches had {tried} refused pointers");
}

#[tokio::test]
async fn a_filter_with_few_matches_is_scanned_in_pages_that_may_be_empty() {
    let broker = TestBroker::start().await;
    let fill = "insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
            topic, record_key, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
            session_seconds)
        select gen_random_uuid(), 'default', 's', 'aborted', at, at, at, at, 'topic', convert_to(case when n = 12000 then 'needle' else 'hay' end, 'UTF8'),
            'text/plain', 1, 'none', 'size', 'bucket', 'object-' || n, 'single', 'none', 900, 3600
        from generate_series(1, 12500) n, lateral (select now() - n * interval '1 second' as at) created";
    sqlx::query(fill).execute(&broker.db).await.unwrap();
    for (filters, expected_pages) in [
        ("key_prefix=needle", 3),
        ("key_prefix=needle&tenant=default", 3),
        // With two states the list merges two scans, each with half of the row limit.
        ("key_prefix=needle&state=aborted&state=expired", 6),
        ("key_prefix=needle&topic=topic&tenant=default", 3),
    ] {
        let (mut found, mut pages, mut cursor) = (Vec::<Value>::new(), 0, String::new());
        loop {
            let page = broker.get(&format!("/lfs/uploads?{filters}{cursor}")).await.expect(200).json;
            found.extend(page["items"].as_array().unwrap().iter().cloned());
            pages += 1;
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
            assert!(pages < 10, "the list does not end");
        }
        assert_eq!((found.len(), pages), (1, expected_pages), "{filters}");
        assert_eq!(found[0]["key"], "needle");
    }
    // These filters have an index.
    for filters in ["topic=nothing&tenant=default", "state=rejected", "state=expired&state=rejected&tenant=default"] {
        let page = broker.get(&format!("/lfs/uploads?{filters}")).await.expect(200).json;
        assert_eq!((page["items"].as_array().unwrap().len(), page["next_cursor"].is_null()), (0, true), "{filters}");
    }
}
