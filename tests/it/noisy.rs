//! A tenant or a topic that makes much work, and those beside it that must not wait for it.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{Answer, House};

/// How many connections of the broker PostgreSQL has, by a condition on them.
async fn backends(house: &House, which: &str) -> i64 {
    let count = format!(
        "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'lfs-broker' and {which}"
    );
    sqlx::query_scalar(sqlx::AssertSqlSafe(count)).fetch_one(&house.db).await.unwrap()
}

async fn open(house: &House, bearer: &str) -> Answer {
    let body = json!({"topic": house.topic, "size": 1});
    house.send(house.request("POST", "/lfs/uploads").bearer_auth(bearer).json(&body)).await
}

#[tokio::test]
async fn callers_that_give_up_never_leave_more_connections_than_the_pool_has() {
    let house = House::with(|settings| settings.store.max_connections = 4).await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    // Whatever is asked of this table waits.
    let mut stuck = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table upload_sessions in access exclusive mode").execute(&mut *stuck).await.unwrap();
    let path = format!("/lfs/uploads/{id}");
    let mut most = 0;
    for _ in 0..8 {
        let url = format!("{}{path}", house.url());
        let asked = (0..6).map(|_| house.http.get(&url).timeout(Duration::from_millis(150)).send());
        let answers = futures_util::future::join_all(asked).await;
        assert!(answers.iter().all(Result::is_err), "nobody waits for an answer");
        for _ in 0..5 {
            most = most.max(backends(&house, "true").await);
        }
    }
    assert!((2..=4).contains(&most), "{most} connections of a pool of 4");
    // The table is still locked: what was given up was cancelled.
    house
        .eventually("no statement is left behind", || async {
            backends(&house, "query like '%where id = $1' and state = 'active'").await == 0
        })
        .await;
    stuck.rollback().await.unwrap();
    house.eventually("the broker answers again", || async { house.get(&path).await.status == 200 }).await;
}

#[tokio::test]
async fn a_tenant_that_waits_for_its_own_row_leaves_others_their_connections() {
    let house = House::with_tokens(|settings| {
        settings.store.max_connections = 8;
        settings.store.tenant_connections = 2;
    })
    .await;
    let (noisy, quiet) = (token("noisy", "lfs:write", &["*"]), token("quiet", "lfs:write", &["*"]));
    open(&house, &noisy).await.expect(201);
    open(&house, &quiet).await.expect(201);
    // As when PostgreSQL is slow to commit what changed the row.
    let mut stuck = house.db.begin().await.unwrap();
    sqlx::query("select from tenants where tenant = 'noisy' for update").execute(&mut *stuck).await.unwrap();
    let waiting = futures_util::future::join_all((0..30).map(|_| open(&house, &noisy)));
    let beside = async {
        house.eventually("the tenant waits", || async { backends(&house, "wait_event_type = 'Lock'").await == 2 }).await;
        for _ in 0..10 {
            open(&house, &quiet).await.expect(201);
            assert!(backends(&house, "wait_event_type = 'Lock'").await <= 2);
        }
        stuck.rollback().await.unwrap();
    };
    let (waited, ()) = tokio::join!(waiting, beside);
    assert!(waited.iter().all(|answer| [201, 503].contains(&answer.status)));
    assert!(waited.iter().any(|answer| answer.status == 201));
}

#[tokio::test]
async fn a_pointer_that_can_be_sent_waits_for_few_of_those_that_were_refused() {
    let house = House::new().await;
    house.publish(b"first", json!({})).await;
    let fill = "with parked as (
            insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
                topic, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
                session_seconds, verified_at, integrity, pointer)
            select gen_random_uuid(), 'default', 's', 'verified', now(), now(), now(), now(), 'it-missing', 'text/plain', 1, 'none',
                'size', 'bucket', 'object-' || n, 'single', 'none', 900, 3600, now(), 'size', '{\"kfs_lfs\":1}'
            from generate_series(1, 4000) n returning id)
        insert into outbox (session_id, shard, topic, value, headers, created_at, next_try_at, error)
        select id, row_number() over () % 4, 'it-missing', '{\"kfs_lfs\":1}', '[]', now(), now(), 'kafka has no topic it-missing' from parked";
    sqlx::query(fill).execute(&house.db).await.unwrap();
    for _ in 0..5 {
        house.publish(b"hello", json!({})).await;
    }
    // Each was tried at most once since, so that many rows were in a batch.
    let counts = "select (select sum(last_batch)::bigint from relay_shards), (select sum(attempts)::bigint from outbox)";
    let (batches, tried): (i64, i64) = sqlx::query_as(counts).fetch_one(&house.db).await.unwrap();
    assert!(tried <= 20 * batches, "{batches} batches had {tried} refused pointers");
}

#[tokio::test]
async fn a_filter_that_matches_little_is_walked_in_pages_that_may_be_empty() {
    let house = House::new().await;
    let fill = "insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
            topic, record_key, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
            session_seconds)
        select gen_random_uuid(), 'default', 's', 'aborted', at, at, at, at, 'topic', convert_to(case when n = 12000 then 'needle' else 'hay' end, 'UTF8'),
            'text/plain', 1, 'none', 'size', 'bucket', 'object-' || n, 'single', 'none', 900, 3600
        from generate_series(1, 12500) n, lateral (select now() - n * interval '1 second' as at) told";
    sqlx::query(fill).execute(&house.db).await.unwrap();
    for (filters, expected_pages) in [
        ("key_prefix=needle", 3),
        ("key_prefix=needle&tenant=default", 3),
        // Two walks beside each other look at half as many each.
        ("key_prefix=needle&state=aborted&state=expired", 6),
        ("key_prefix=needle&topic=topic&tenant=default", 3),
    ] {
        let (mut found, mut pages, mut cursor) = (Vec::<Value>::new(), 0, String::new());
        loop {
            let page = house.get(&format!("/lfs/uploads?{filters}{cursor}")).await.expect(200).json;
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
    // What has an index is looked up.
    for filters in ["topic=nothing&tenant=default", "state=rejected", "state=expired&state=rejected&tenant=default"] {
        let page = house.get(&format!("/lfs/uploads?{filters}")).await.expect(200).json;
        assert_eq!((page["items"].as_array().unwrap().len(), page["next_cursor"].is_null()), (0, true), "{filters}");
    }
}
