//! The database of a broker that runs: its schema moves ahead, its rows grow many or break, it is only read.

use std::time::Duration;

use lfs_broker::store::Store;
use serde_json::json;

use crate::harness::uploads::PART;
use crate::harness::{House, bytes};

#[tokio::test]
async fn a_column_that_a_later_migration_adds_breaks_no_replica_that_runs() {
    let house = House::with(|settings| settings.store.max_connections = 3).await;
    let waiting = house.put_up(&bytes(PART + 9, 1), json!({"part_size": PART})).await;
    let everything = async || {
        let id = house.publish(b"hello", json!({})).await.id();
        house.upload(&id).await.expect(200);
        house.get("/lfs/uploads").await.expect(200);
        let dropped = house.open(b"x", json!({})).await.expect(201).id();
        house.delete(&format!("/lfs/uploads/{dropped}")).await.expect(204);
        let record = house.records(&house.topic).await.remove(0);
        house.resolve(&record.value, "").await.expect(200);
    };
    // Every connection has prepared what it is asked.
    for _ in 0..4 {
        everything().await;
    }
    sqlx::raw_sql("alter table upload_sessions add column later int").execute(&house.db).await.unwrap();
    for _ in 0..4 {
        everything().await;
    }
    // The workers go on too: this one is read by the verifier, that one is ended by the sweeper.
    house.complete(&waiting.id()).await;
    house.until(&waiting.id(), "published").await;
    let left = house.open(b"x", json!({})).await.expect(201);
    house.push_clock(Duration::from_secs(3601));
    house.eventually("it has expired", || async { house.quota().await == (0, 0) }).await;
    house.until(&left.id(), "expired").await;
}

#[tokio::test]
async fn a_migration_waits_for_another_longer_than_a_request_would() {
    let house = House::new().await;
    let mut other = house.db.begin().await.unwrap();
    sqlx::raw_sql("lock table _sqlx_migrations in access exclusive mode").execute(&mut *other).await.unwrap();
    let store = Store::connect(&house.settings.store).unwrap();
    let migrating = store.migrate();
    let ended = async {
        // Past lock_timeout and statement_timeout of a request.
        tokio::time::sleep(Duration::from_secs(11)).await;
        other.rollback().await.unwrap();
    };
    let (migrated, ()) = tokio::join!(migrating, ended);
    migrated.unwrap();
    store.check_schema().await.unwrap();
}

/// Fills a house's database, where one upload is published, with sessions of five tenants and a key for each: most are
/// of the last half a day.
async fn fill(house: &House) {
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
            now() - case when n > 14900 then interval '30 hours' else n * interval '3 seconds' end as at) told";
    let keys = "insert into idempotency_keys (tenant, subject, key, request_sha256, session_id, created_at)
        select tenant, subject, object_key, '\\x00', id, created_at from upload_sessions";
    // What this connection did is in the statistics before anybody looks at them.
    let tell = "select pg_stat_force_next_flush()";
    let mut filling = house.db.acquire().await.unwrap();
    for statement in [sessions, keys, "vacuum analyze upload_sessions", "vacuum analyze idempotency_keys", tell] {
        sqlx::query(statement).execute(&mut *filling).await.unwrap();
    }
}

/// How often an index was used.
async fn uses(house: &House, index: &str) -> i64 {
    let uses = sqlx::query_scalar("select idx_scan from pg_stat_user_indexes where indexrelname = $1");
    uses.bind(index).fetch_one(&house.db).await.unwrap()
}

/// How often whole tables of uploads were read.
async fn scans(house: &House) -> String {
    let scans = "select string_agg(relname || ' ' || seq_scan, ', ' order by relname) from pg_stat_user_tables
                 where relname in ('upload_sessions', 'idempotency_keys')";
    sqlx::query_scalar(scans).fetch_one(&house.db).await.unwrap()
}

#[tokio::test]
async fn lists_counts_and_the_forgetting_of_keys_read_no_table_whole() {
    let mut house = House::new().await;
    house.publish(b"hello", json!({})).await;
    house.stop().await;
    fill(&house).await;
    house.start(|settings| settings.sweeper.every = Duration::from_secs(2)).await;
    let before = scans(&house).await;
    let lists =
        ["", "?state=rejected", "?tenant=tenant-1&state=rejected", "?tenant=tenant-1", "?created_before=2026-01-01T00:00:00Z"];
    for _ in 0..8 {
        for list in lists {
            house.get(&format!("/lfs/uploads{list}")).await.expect(200);
        }
        house.get("/lfs/stats").await.expect(200);
    }
    let forgotten = "select n_tup_del = 100 from pg_stat_user_tables where relname = 'idempotency_keys'";
    house
        .eventually("old keys are forgotten", || async { sqlx::query_scalar(forgotten).fetch_one(&house.db).await.unwrap() })
        .await;
    for index in
        ["upload_sessions_newest_of_all", "upload_sessions_unpublished", "upload_sessions_newest", "idempotency_keys_oldest"]
    {
        house.eventually(&format!("{index} was used"), || async { uses(&house, index).await > 0 }).await;
    }
    assert_eq!(scans(&house).await, before, "a table was read whole");
}

#[tokio::test]
async fn a_database_that_is_only_read_does_not_make_the_verifier_spin() {
    let house = House::with(|settings| settings.sweeper.every = Duration::from_secs(60)).await;
    let id = house.put_up(b"hello", json!({})).await.id();
    house.taken_by_the_dead(&id).await;
    let mut admin = house.db.acquire().await.unwrap();
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&mut *admin).await.unwrap();
    // For whoever connects from now on.
    let again =
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    let only_read = format!("alter database {name} set default_transaction_read_only = on; {again}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(only_read)).execute(&mut *admin).await.unwrap();
    house.push_clock(Duration::from_secs(31));
    let transactions = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()";
    let before: i64 = sqlx::query_scalar(transactions).fetch_one(&mut *admin).await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after: i64 = sqlx::query_scalar(transactions).fetch_one(&mut *admin).await.unwrap();
    assert!((10..300).contains(&(after - before)), "{} transactions in 5 seconds", after - before);
    let writable = format!("alter database {name} reset default_transaction_read_only; {again}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(writable)).execute(&mut *admin).await.unwrap();
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    house.until(&id, "published").await;
}

#[tokio::test]
async fn a_row_that_breaks_its_rules_holds_no_other_up() {
    let house = House::new().await;
    let state = async |id: &str| -> String {
        let state = sqlx::query_scalar("select state from upload_sessions where id = $1::uuid");
        state.bind(id).fetch_one(&house.db).await.unwrap()
    };
    let (mut open, mut completing, mut aborted) = (Vec::new(), Vec::new(), Vec::new());
    // More that cannot be read than the verifier has seats, and each kind's oldest.
    for _ in 0..7 {
        open.push(house.open(b"hello", json!({})).await.expect(201).id());
        aborted.push(house.open(b"hello", json!({})).await.expect(201).id());
        completing.push(house.put_up(b"hello", json!({})).await.id());
    }
    let changes = "update upload_sessions set record_headers = '{\"a\": 1}' where id <> all($1::uuid[])";
    let whole: Vec<&String> = [&open, &aborted, &completing].iter().map(|ids| ids.last().unwrap()).collect();
    sqlx::query(changes).bind(&whole).execute(&house.db).await.unwrap();
    let ended = "update upload_sessions set state = 'aborted', cleanup_due_at = created_at where id = any($1::uuid[])";
    sqlx::query(ended).bind(&aborted).execute(&house.db).await.unwrap();
    let taken = "update upload_sessions set state = 'completing', lease_owner = gen_random_uuid(), lease_attempt = 1,
                     lease_until = created_at, version = version + 1 where id = any($1::uuid[])";
    sqlx::query(taken).bind(&completing).execute(&house.db).await.unwrap();
    house.until(&completing[6], "published").await;
    // The next pass is due when its URL has ended.
    let swept = "select cleanup_due_at > clock_timestamp() + interval '10 minutes' from upload_sessions where id = $1::uuid";
    house
        .eventually("the sound one is swept", || async {
            sqlx::query_scalar::<_, bool>(swept).bind(&aborted[6]).fetch_one(&house.db).await.unwrap()
        })
        .await;
    house.push_clock(Duration::from_secs(3601));
    house.eventually("the sound one has expired", || async { state(&open[6]).await == "expired" }).await;
    for id in [&open[0], &aborted[0], &completing[0]] {
        house.upload(id).await.expect_problem(500, "internal");
    }
}

#[tokio::test]
async fn a_stricter_default_isolation_refuses_no_upload() {
    let mut house = House::new().await;
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&house.db).await.unwrap();
    let stricter = format!("alter database {name} set default_transaction_isolation = 'serializable'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(stricter)).execute(&house.db).await.unwrap();
    house.restart(|_| {}).await;
    let opened = futures_util::future::join_all((0..60).map(|_| house.open(b"x", json!({})))).await;
    for opened in opened {
        opened.expect(201);
    }
    house.publish(b"hello", json!({"key": "k"})).await;
}
