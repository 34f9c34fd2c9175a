//! The database under a running broker: newer migrations, many rows, corrupt rows, and read-only mode.

use std::time::{Duration, Instant};

use lfs_broker::store::{self, Store};
use serde_json::json;

use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes};

#[tokio::test]
async fn a_column_that_a_later_migration_adds_breaks_no_running_replica() {
    let broker = TestBroker::start_with(|settings| settings.store.max_connections = 3).await;
    let waiting = broker.open_and_put(&bytes(PART_BYTES + 9, 1), json!({"part_size": PART_BYTES})).await;
    let run_every_query = async || {
        let id = broker.publish(b"hello", json!({})).await.id();
        broker.upload(&id).await.expect(200);
        broker.get("/lfs/uploads").await.expect(200);
        let dropped = broker.open(b"x", json!({})).await.expect(201).id();
        broker.delete(&format!("/lfs/uploads/{dropped}")).await.expect(204);
        let record = broker.records(&broker.topic).await.remove(0);
        broker.resolve(&record.value, "").await.expect(200);
    };
    // Now every connection has prepared its statements.
    for _ in 0..4 {
        run_every_query().await;
    }
    sqlx::raw_sql("alter table upload_sessions add column later int").execute(&broker.db).await.unwrap();
    for _ in 0..4 {
        run_every_query().await;
    }
    // The workers continue too: the verifier reads this upload, and the sweeper expires the other.
    broker.complete(&waiting.id()).await;
    broker.wait_for_state(&waiting.id(), "published").await;
    let expiring = broker.open(b"x", json!({})).await.expect(201);
    broker.advance_clock(Duration::from_secs(3601));
    broker.eventually("the session has expired", || async { broker.tenant_usage().await == (0, 0) }).await;
    broker.wait_for_state(&expiring.id(), "expired").await;
}

#[tokio::test]
async fn a_migration_waits_for_another_longer_than_a_request_would() {
    let broker = TestBroker::start().await;
    let mut other = broker.db.begin().await.unwrap();
    sqlx::raw_sql("lock table _sqlx_migrations in access exclusive mode").execute(&mut *other).await.unwrap();
    let settings = store::Settings { call_timeout: Duration::from_secs(3), ..broker.settings.store.clone() };
    let store = Store::connect(&settings).unwrap();
    let migrating = store.migrate();
    let released = async {
        // Longer than lock_timeout and statement_timeout of a request: 1.5 s and 3 s.
        tokio::time::sleep(Duration::from_millis(4500)).await;
        other.rollback().await.unwrap();
    };
    let (migrated, ()) = tokio::join!(migrating, released);
    migrated.unwrap();
    store.check_schema().await.unwrap();
}

/// Fills a database that has one published upload with sessions of five tenants and an idempotency key for each. Most
/// are from the last half day.
async fn fill(broker: &TestBroker) {
    let sessions =
        "insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
            topic, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
            session_seconds, verified_at, integrity, pointer, published_partition, published_offset, published_at, error_code)
        select gen_random_uuid(), 'tenant-' || n % 5, 's', case when sent then 'published' else 'rejected' end, at, at, at, at,
            'topic', 'text/plain', 1, 'none', 'size', 'bucket', 'object-' || n, 'single', 'none', 900,
            3600, case when sent then at end, case when sent then 'size' end, case when sent then (select pointer from upload_sessions) end,
            case when sent then 0 end, case when sent then n end, case when sent then at end,
            case when not sent then 'size-mismatch' end
        from generate_series(1, 15000) n, lateral (select n % 500 > 0 as sent,
            now() - case when n > 14900 then interval '30 hours' else n * interval '3 seconds' end as at) created";
    let keys = "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
        select tenant, subject, object_key, '\\x00', id, created_at from upload_sessions";
    // The statistics of this connection are flushed before the test reads them.
    let flush = "select pg_stat_force_next_flush()";
    let mut connection = broker.db.acquire().await.unwrap();
    for statement in [sessions, keys, "vacuum analyze upload_sessions", "vacuum analyze idempotency_keys", flush] {
        sqlx::query(statement).execute(&mut *connection).await.unwrap();
    }
}

/// How often an index was scanned.
async fn uses(broker: &TestBroker, index: &str) -> i64 {
    let uses = sqlx::query_scalar("select idx_scan from pg_stat_user_indexes where indexrelname = $1");
    uses.bind(index).fetch_one(&broker.db).await.unwrap()
}

/// How often the large tables were read by a sequential scan.
async fn scans(broker: &TestBroker) -> String {
    let scans = "select string_agg(relname || ' ' || seq_scan, ', ' order by relname) from pg_stat_user_tables
                 where relname in ('upload_sessions', 'idempotency_keys')";
    sqlx::query_scalar(scans).fetch_one(&broker.db).await.unwrap()
}

#[tokio::test]
async fn lists_counts_and_key_cleanup_never_scan_a_whole_table() {
    let mut broker = TestBroker::start().await;
    broker.publish(b"hello", json!({})).await;
    broker.stop().await;
    fill(&broker).await;
    broker.start_again(|settings| settings.sweeper.interval = Duration::from_secs(2)).await;
    let before = scans(&broker).await;
    let lists =
        ["", "?state=rejected", "?tenant=tenant-1&state=rejected", "?tenant=tenant-1", "?created_before=2026-01-01T00:00:00Z"];
    for _ in 0..8 {
        for list in lists {
            broker.get(&format!("/lfs/uploads{list}")).await.expect(200);
        }
        broker.get("/lfs/stats").await.expect(200);
    }
    let deleted = "select n_tup_del = 100 from pg_stat_user_tables where relname = 'idempotency_keys'";
    broker
        .eventually("old keys are deleted", || async { sqlx::query_scalar(deleted).fetch_one(&broker.db).await.unwrap() })
        .await;
    for index in
        ["upload_sessions_newest_of_all", "upload_sessions_unpublished", "upload_sessions_newest", "idempotency_keys_oldest"]
    {
        broker.eventually(&format!("{index} was used"), || async { uses(&broker, index).await > 0 }).await;
    }
    assert_eq!(scans(&broker).await, before, "a table was scanned");
}

#[tokio::test]
async fn a_read_only_database_does_not_make_the_verifier_spin() {
    let broker = TestBroker::start_with(|settings| settings.sweeper.interval = Duration::from_secs(60)).await;
    let id = broker.open_and_put(b"hello", json!({})).await.id();
    broker.lease_to_dead_replica(&id).await;
    let mut admin = broker.db.acquire().await.unwrap();
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&mut *admin).await.unwrap();
    // The setting applies to new connections, so the old ones are ended.
    let end_connections =
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    let read_only = format!("alter database {name} set default_transaction_read_only = on; {end_connections}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(read_only)).execute(&mut *admin).await.unwrap();
    broker.advance_clock(Duration::from_secs(31));
    let transactions = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()";
    let mut count = async || -> i64 { sqlx::query_scalar(transactions).fetch_one(&mut *admin).await.unwrap() };
    let before = count().await;
    // A verifier that retries without a pause would make thousands of transactions in this time. A busy machine makes fewer.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let in_two_seconds = count().await - before;
    assert!(in_two_seconds < 200, "{in_two_seconds} transactions in 2 seconds");
    let deadline = Instant::now() + Duration::from_secs(25);
    while count().await - before < 10 {
        assert!(Instant::now() < deadline, "the workers do not try again");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let writable = format!("alter database {name} reset default_transaction_read_only; {end_connections}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(writable)).execute(&mut *admin).await.unwrap();
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    broker.wait_for_state(&id, "published").await;
}

#[tokio::test]
async fn a_corrupt_row_does_not_block_other_rows() {
    let broker = TestBroker::start().await;
    let state = async |id: &str| -> String {
        let state = sqlx::query_scalar("select state from upload_sessions where id = $1::uuid");
        state.bind(id).fetch_one(&broker.db).await.unwrap()
    };
    let (mut open, mut completing, mut aborted) = (Vec::new(), Vec::new(), Vec::new());
    // There are more corrupt rows than the verifier works on at once, and the oldest of each kind is corrupt.
    for _ in 0..7 {
        open.push(broker.open(b"hello", json!({})).await.expect(201).id());
        aborted.push(broker.open(b"hello", json!({})).await.expect(201).id());
        completing.push(broker.open_and_put(b"hello", json!({})).await.id());
    }
    let changes = "update upload_sessions set record_headers = '{\"a\": 1}' where id <> all($1::uuid[])";
    let valid: Vec<&String> = [&open, &aborted, &completing].iter().map(|ids| ids.last().unwrap()).collect();
    sqlx::query(changes).bind(&valid).execute(&broker.db).await.unwrap();
    let released = "update upload_sessions set state = 'aborted', cleanup_due_at = created_at where id = any($1::uuid[])";
    sqlx::query(released).bind(&aborted).execute(&broker.db).await.unwrap();
    let leased = "update upload_sessions set state = 'completing', lease_owner = gen_random_uuid(), lease_attempt = 1,
                     lease_until = created_at, version = version + 1 where id = any($1::uuid[])";
    sqlx::query(leased).bind(&completing).execute(&broker.db).await.unwrap();
    broker.wait_for_state(&completing[6], "published").await;
    // The next cleanup is due when the upload's URL has expired.
    let cleaned_up = "select cleanup_due_at > clock_timestamp() + interval '10 minutes' from upload_sessions where id = $1::uuid";
    broker
        .eventually("the valid session is cleaned up", || async {
            sqlx::query_scalar::<_, bool>(cleaned_up).bind(&aborted[6]).fetch_one(&broker.db).await.unwrap()
        })
        .await;
    broker.advance_clock(Duration::from_secs(3601));
    broker.eventually("the valid session has expired", || async { state(&open[6]).await == "expired" }).await;
    for id in [&open[0], &aborted[0], &completing[0]] {
        broker.upload(id).await.expect_problem(500, "internal");
    }
}

#[tokio::test]
async fn a_stricter_default_isolation_level_fails_no_open() {
    let mut broker = TestBroker::start().await;
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&broker.db).await.unwrap();
    let stricter = format!("alter database {name} set default_transaction_isolation = 'serializable'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(stricter)).execute(&broker.db).await.unwrap();
    broker.restart(|_| {}).await;
    let opened = futures_util::future::join_all((0..60).map(|_| broker.open(b"x", json!({})))).await;
    for opened in opened {
        opened.expect(201);
    }
    broker.publish(b"hello", json!({"key": "k"})).await;
}
