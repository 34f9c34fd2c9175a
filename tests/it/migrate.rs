//! `migrate` beside running brokers.

use std::cell::Cell;
use std::time::Duration;

use lfs_broker::store::Store;
use serde_json::json;
use sqlx::Connection as _;
use sqlx::migrate::Migrator;

use crate::harness::TestBroker;
use crate::harness::servers::servers;

#[tokio::test]
async fn migrate_builds_indexes_without_blocking_writers() {
    let url = servers().database().await;
    let mut db = sqlx::PgConnection::connect(&url).await.unwrap();
    // The schema of the first release.
    sqlx::raw_sql("drop schema public cascade; create schema public").execute(&mut db).await.unwrap();
    let all: Migrator = sqlx::migrate!();
    Migrator::with_migrations(all.iter().take(1).cloned().collect()).run(&mut db).await.unwrap();
    // A long transaction has written a row, and other connections write while `migrate` waits for it.
    let mut long = db.begin().await.unwrap();
    let write = "insert into upload_sessions (id, tenant, subject, state, created_at, updated_at, expires_at, expires_latest_at,
            topic, content_type, size_bytes, checksum_alg, min_integrity, bucket, object_key, mode, part_hashes, url_seconds,
            session_seconds)
        select id, 'default', 's', 'aborted', now(), now(), now(), now(), 'topic', 'text/plain', 1, 'none', 'size', 'bucket',
            id::text, 'single', 'none', 900, 3600 from (select gen_random_uuid() as id) new";
    sqlx::query(write).execute(&mut *long).await.unwrap();
    let store = Store::connect(&lfs_broker::store::Settings::new(&url)).unwrap();
    let mut other = sqlx::PgConnection::connect(&url).await.unwrap();
    let is_done = Cell::new(false);
    let migrating = async {
        store.migrate().await.unwrap();
        is_done.set(true);
    };
    let beside = async {
        let waits =
            "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
        for attempt in 0.. {
            if sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut other).await.unwrap() {
                break;
            }
            assert!(attempt < 200 && !is_done.get(), "migrate does not wait for the transaction");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        sqlx::query("set lock_timeout = '10s'").execute(&mut other).await.unwrap();
        sqlx::query(write).execute(&mut other).await.expect("a writer does not wait");
        assert!(!is_done.get());
        long.commit().await.unwrap();
    };
    tokio::join!(migrating, beside);
    store.check_schema().await.unwrap();
    let broken: i64 =
        sqlx::query_scalar("select count(*) from pg_index where not indisvalid").fetch_one(&mut other).await.unwrap();
    assert_eq!(broken, 0);
}

#[tokio::test]
async fn migrate_rebuilds_an_index_whose_build_was_interrupted() {
    let broker = TestBroker::start().await;
    let broken = "update pg_index set indisvalid = false where indexrelid = 'upload_sessions_unattended'::regclass";
    sqlx::query(broken).execute(&broker.db).await.unwrap();
    sqlx::query("delete from _sqlx_migrations where version = 6").execute(&broker.db).await.unwrap();
    // Two replicas migrate concurrently when they start together.
    let store = Store::connect(&broker.settings.store).unwrap();
    let (one, other) = tokio::join!(store.migrate(), store.migrate());
    one.unwrap();
    other.unwrap();
    let valid = "select indisvalid from pg_index where indexrelid = 'upload_sessions_unattended'::regclass";
    assert!(sqlx::query_scalar::<_, bool>(valid).fetch_one(&broker.db).await.unwrap());
    broker.publish(b"hello", json!({})).await;
}
