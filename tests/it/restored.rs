//! PostgreSQL went back to a backup while Kafka did not: nothing that a pointer in Kafka names is deleted, whatever the
//! database says, and the broker says that it is not ready.

use std::time::Duration;

use lfs_broker::app;
use lfs_broker::audit::{Audit, Kind};
use lfs_broker::kafka::{Delivery, Kafka};
use lfs_broker::objects::Objects;
use lfs_broker::store::Store;
use serde_json::json;
use time::OffsetDateTime;

use crate::audit::is_clean;
use crate::harness::House;
use crate::harness::proxy::Wire;
use crate::harness::servers::servers;

/// The end of a session by the default policy, and a little more.
const EXPIRED: Duration = Duration::from_secs(3601);

/// What nobody serves.
const CLOSED: &str = "127.0.0.1:9";

impl House {
    /// Puts the database back to before anything was published: every upload is open, no shard has sent a batch.
    async fn go_back(&self) {
        let back = "with back as (
                 update upload_sessions set state = 'open', verified_at = null, integrity = null, pointer = null,
                        object_etag = null, object_version_id = null, published_partition = null, published_offset = null,
                        published_at = null
                 where state = 'published' returning tenant, size_bytes),
             held as (select tenant, count(*) as sessions, sum(size_bytes)::bigint as bytes from back group by tenant),
             quota as (
                 update tenants set open_sessions = open_sessions + held.sessions, reserved_bytes = reserved_bytes + held.bytes
                 from held where tenants.tenant = held.tenant)
             update relay_shards set last_batch = 0";
        sqlx::raw_sql(back).execute(&self.db).await.unwrap();
    }

    /// Waits until the sweeper has taken this upload twice more: its first pass is over by then.
    async fn is_swept_over(&self, id: &str) {
        let due = || async {
            let due: (Option<OffsetDateTime>,) = sqlx::query_as("select cleanup_due_at from upload_sessions where id = $1::uuid")
                .bind(id)
                .fetch_one(&self.db)
                .await
                .unwrap();
            due.0.expect("it was not swept")
        };
        for _ in 0..2 {
            let before = due().await;
            self.eventually("the sweeper takes it again", || async { due().await != before }).await;
        }
    }

    async fn audited(&self, fix: bool) -> lfs_broker::audit::Report {
        let store = Store::connect(&self.settings.store).unwrap();
        let objects = Objects::connect(&self.settings.objects).await.unwrap();
        let kafka = Kafka::connect(&self.settings.kafka).unwrap();
        Audit { store, objects, kafka, fix }.run().await.unwrap()
    }

    /// Audits with `--fix`, starts the broker, and asserts that the upload is what it was.
    async fn is_reconciled(&mut self, id: &str, before: &serde_json::Value) {
        let kinds = |report: &lfs_broker::audit::Report| report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>();
        let report = self.audited(false).await;
        assert!(kinds(&report).contains(&Kind::KafkaAhead) && kinds(&report).contains(&Kind::MarkerAhead), "{report:#?}");
        let fixed = self.audited(true).await;
        assert_eq!(fixed.finding(Kind::KafkaAhead).map(|finding| finding.fixed), Some(1), "{fixed:#?}");
        assert_eq!(fixed.finding(Kind::MarkerAhead).map(|finding| finding.fixed), Some(1), "{fixed:#?}");
        self.start(|_| {}).await;
        let after = self.upload(id).await;
        assert_eq!(after.state(), "published");
        assert_eq!((&after.json["record"], &after.json["pointer"]), (&before["record"], &before["pointer"]));
        assert_eq!(self.only_record().await.1, b"hello");
        self.get("/readyz").await.expect(200);
        is_clean(self).await;
    }
}

async fn is_not_ready(house: &House) {
    let told = || async {
        let ready = house.get("/readyz").await;
        let reason = ready.json["database"]["reason"].as_str().unwrap_or_default().to_owned();
        ready.status == 503 && reason.contains("older than Kafka") && reason.contains("lfs-broker audit --fix")
    };
    house.eventually("readiness says that the database is older", told).await;
}

#[tokio::test]
async fn a_restored_database_deletes_nothing_while_kafka_is_unreachable() {
    let mut house = House::new().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&done.id()).await;
    house.stop().await;
    house.go_back().await;
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    house.start(|settings| settings.kafka.bootstrap_servers = CLOSED.to_owned()).await;
    house.push_clock(EXPIRED);
    // Quotas do not wait for Kafka: the session ends, its object stays.
    house.until(&done.id(), "expired").await;
    house.is_swept_over(&done.id()).await;
    assert_eq!(house.objects().await.len(), 1, "the object of a pointer in Kafka was deleted");
    house.stop().await;
    house.settings.kafka.bootstrap_servers = kafka;
    house.is_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_restored_database_deletes_nothing_while_kafka_is_slower_than_the_start_waits() {
    let mut house = House::new().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&done.id()).await;
    house.stop().await;
    house.go_back().await;
    let wire = Wire::to(&servers().kafka).await;
    wire.silence();
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    house.start(|settings| settings.kafka.bootstrap_servers = wire.address().to_string()).await;
    house.push_clock(EXPIRED);
    house.until(&done.id(), "expired").await;
    house.is_swept_over(&done.id()).await;
    assert_eq!(house.objects().await.len(), 1, "the object of a pointer in Kafka was deleted");
    wire.restore().await;
    is_not_ready(&house).await;
    assert_eq!(house.objects().await.len(), 1);
    house.stop().await;
    house.settings.kafka.bootstrap_servers = kafka;
    house.is_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_restored_database_is_detected_with_at_least_once() {
    let mut house = House::with(|settings| settings.kafka.delivery = Delivery::AtLeastOnce).await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&done.id()).await;
    house.stop().await;
    house.go_back().await;
    let refused = app::start(house.settings.clone()).await.err();
    assert!(matches!(refused, Some(app::Error::Restored(_))), "{refused:?}");
    house.is_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_database_that_goes_back_under_a_running_broker_deletes_nothing_until_the_audit() {
    let house = House::new().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    let before = house.upload(&done.id()).await;
    let open = house.put_up(b"never completed", json!({})).await;
    house.go_back().await;
    house.push_clock(EXPIRED);
    is_not_ready(&house).await;
    // A client that asks ends what is overdue, as the database has it, and has it swept.
    assert_eq!(house.upload(&done.id()).await.state(), "expired");
    house.is_swept_over(&done.id()).await;
    assert_eq!(house.objects().await.len(), 2, "an object was deleted because of an old database");
    assert_eq!(house.upload(&open.id()).await.state(), "expired", "asked for, it is over");

    let fixed = house.audited(true).await;
    assert_eq!(fixed.finding(Kind::KafkaAhead).map(|finding| (finding.count, finding.fixed)), Some((1, 1)), "{fixed:#?}");
    let after = house.upload(&done.id()).await;
    assert_eq!((after.state(), &after.json["record"]), ("published", &before.json["record"]));
    house.eventually("the broker is ready again", || async { house.get("/readyz").await.status == 200 }).await;
    // What really failed is removed now, and only that.
    house.eventually("one object is left", || async { house.objects().await.len() == 1 }).await;
    assert_eq!(house.only_record().await.1, b"hello");
    let history = house.get(&format!("/lfs/uploads/{}/history", done.id())).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["from"], &last["to"], &last["by"]), (&json!("expired"), &json!("published"), &json!("audit")));
    is_clean(&house).await;
}

#[tokio::test]
async fn nothing_is_deleted_while_kafka_lists_no_marker_topic_though_batches_were_sent() {
    let mut house = House::new().await;
    house.publish(b"hello", json!({"key": "k"})).await;
    let failed = house.put_up(b"taken back", json!({})).await;
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    // As a Kafka that has just come back: it answers, and does not know its topics yet.
    let blank = lfs_broker::dev::kafka::Server::start().unwrap();
    house.restart(|settings| settings.kafka.bootstrap_servers = blank.bootstrap_servers()).await;
    house.delete(&format!("/lfs/uploads/{}", failed.id())).await.expect(204);
    house.is_swept_over(&failed.id()).await;
    assert_eq!(house.objects().await.len(), 2);
    house.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    house.eventually("what failed is removed", || async { house.objects().await.len() == 1 }).await;
}

#[tokio::test]
async fn an_upload_that_was_aborted_in_a_restored_database_is_taken_back_and_holds_no_quota() {
    let house = House::new().await;
    let done = house.publish(b"hello", json!({"key": "k"})).await;
    house.go_back().await;
    house.delete(&format!("/lfs/uploads/{}", done.id())).await.expect(204);
    house.is_swept_over(&done.id()).await;
    assert_eq!(house.audited(true).await.finding(Kind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    assert_eq!(house.upload(&done.id()).await.state(), "published");
    assert_eq!(house.quota().await, (0, 0));
    assert_eq!(house.only_record().await.1, b"hello");
    is_clean(&house).await;
}
