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
