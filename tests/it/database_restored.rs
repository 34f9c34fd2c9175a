//! PostgreSQL was restored from a backup while Kafka was not: the broker deletes no object that a pointer in Kafka
//! names, whatever the database contains, and it reports that it is not ready.

use std::time::Duration;

use lfs_broker::app;
use lfs_broker::audit::{Audit, FindingKind};
use lfs_broker::kafka::{Delivery, Kafka};
use lfs_broker::objects::Objects;
use lfs_broker::store::Store;
use serde_json::json;
use time::OffsetDateTime;

use crate::audit::assert_clean;
use crate::harness::TestBroker;
use crate::harness::fault_proxy::FaultProxy;
use crate::harness::servers::servers;

/// Just after the end of a session with the default policy.
const EXPIRED: Duration = Duration::from_secs(3601);

/// A port on which no server listens.
const NO_SERVER: &str = "127.0.0.1:9";

impl TestBroker {
    /// Moves the database back to before the publications: every upload is open, and no shard has sent a batch.
    async fn restore_backup(&self) {
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

    /// Waits until the sweeper has deferred this upload's cleanup twice more, so its first cleanup is done.
    async fn wait_for_cleanups(&self, id: &str) {
        let due = || async {
            let due: (Option<OffsetDateTime>,) = sqlx::query_as("select cleanup_due_at from upload_sessions where id = $1::uuid")
                .bind(id)
                .fetch_one(&self.db)
                .await
                .unwrap();
            due.0.expect("a cleanup is due")
        };
        for _ in 0..2 {
            let before = due().await;
            self.eventually("the sweeper defers the cleanup again", || async { due().await != before }).await;
        }
    }

    async fn run_audit(&self, fix: bool) -> lfs_broker::audit::Report {
        let store = Store::connect(&self.settings.store).unwrap();
        let objects = Objects::connect(&self.settings.objects).await.unwrap();
        let kafka = Kafka::connect(&self.settings.kafka).unwrap();
        Audit { store, objects, kafka, fix }.run().await.unwrap()
    }

    /// Audits with `--fix`, starts the broker, and asserts that the upload is as before.
    async fn assert_reconciled(&mut self, id: &str, before: &serde_json::Value) {
        let kinds = |report: &lfs_broker::audit::Report| report.findings.iter().map(|finding| finding.kind).collect::<Vec<_>>();
        let report = self.run_audit(false).await;
        assert!(
            kinds(&report).contains(&FindingKind::KafkaAhead) && kinds(&report).contains(&FindingKind::MarkerAhead),
            "{report:#?}"
        );
        let fixed = self.run_audit(true).await;
        assert_eq!(fixed.finding(FindingKind::KafkaAhead).map(|finding| finding.fixed), Some(1), "{fixed:#?}");
        assert_eq!(fixed.finding(FindingKind::MarkerAhead).map(|finding| finding.fixed), Some(1), "{fixed:#?}");
        self.start_again(|_| {}).await;
        let after = self.upload(id).await;
        assert_eq!(after.state(), "published");
        assert_eq!((&after.json["record"], &after.json["pointer"]), (&before["record"], &before["pointer"]));
        assert_eq!(self.only_record().await.1, b"hello");
        self.get("/readyz").await.expect(200);
        assert_clean(self).await;
    }
}

async fn wait_until_not_ready(broker: &TestBroker) {
    let is_reported = || async {
        let ready = broker.get("/readyz").await;
        let reason = ready.json["database"]["reason"].as_str().unwrap_or_default().to_owned();
        ready.status == 503 && reason.contains("older than Kafka") && reason.contains("lfs-broker audit --fix")
    };
    broker.eventually("readiness says that the database is older", is_reported).await;
}

#[tokio::test]
async fn a_restored_database_deletes_nothing_while_kafka_is_unreachable() {
    let mut broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&done.id()).await;
    broker.stop().await;
    broker.restore_backup().await;
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    broker.start_again(|settings| settings.kafka.bootstrap_servers = NO_SERVER.to_owned()).await;
    broker.advance_clock(EXPIRED);
    // The quota is released without Kafka: the session expires, but its object stays.
    broker.wait_for_state(&done.id(), "expired").await;
    broker.wait_for_cleanups(&done.id()).await;
    assert_eq!(broker.objects().await.len(), 1, "the object of a pointer in Kafka was deleted");
    broker.stop().await;
    broker.settings.kafka.bootstrap_servers = kafka;
    broker.assert_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_restored_database_deletes_nothing_while_kafka_is_slower_than_the_start_waits() {
    let mut broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&done.id()).await;
    broker.stop().await;
    broker.restore_backup().await;
    let proxy = FaultProxy::to(&servers().kafka).await;
    proxy.stall();
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    broker.start_again(|settings| settings.kafka.bootstrap_servers = proxy.address().to_string()).await;
    broker.advance_clock(EXPIRED);
    broker.wait_for_state(&done.id(), "expired").await;
    broker.wait_for_cleanups(&done.id()).await;
    assert_eq!(broker.objects().await.len(), 1, "the object of a pointer in Kafka was deleted");
    proxy.restore().await;
    wait_until_not_ready(&broker).await;
    assert_eq!(broker.objects().await.len(), 1);
    broker.stop().await;
    broker.settings.kafka.bootstrap_servers = kafka;
    broker.assert_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_restored_database_is_detected_with_at_least_once_delivery() {
    let mut broker = TestBroker::start_with(|settings| settings.kafka.delivery = Delivery::AtLeastOnce).await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&done.id()).await;
    broker.stop().await;
    broker.restore_backup().await;
    let refused = app::start(broker.settings.clone()).await.err();
    assert!(matches!(refused, Some(app::Error::DatabaseRestored(_))), "{refused:?}");
    broker.assert_reconciled(&done.id(), &before.json).await;
}

#[tokio::test]
async fn a_database_that_goes_back_under_a_running_broker_deletes_nothing_until_the_audit() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    let before = broker.upload(&done.id()).await;
    let open = broker.open_and_put(b"never completed", json!({})).await;
    broker.restore_backup().await;
    broker.advance_clock(EXPIRED);
    wait_until_not_ready(&broker).await;
    // In this database the upload is overdue, so a read expires it and schedules its cleanup.
    assert_eq!(broker.upload(&done.id()).await.state(), "expired");
    broker.wait_for_cleanups(&done.id()).await;
    assert_eq!(broker.objects().await.len(), 2, "an object was deleted because of an old database");
    assert_eq!(broker.upload(&open.id()).await.state(), "expired", "a read expires the upload");

    let fixed = broker.run_audit(true).await;
    assert_eq!(fixed.finding(FindingKind::KafkaAhead).map(|finding| (finding.count, finding.fixed)), Some((1, 1)), "{fixed:#?}");
    let after = broker.upload(&done.id()).await;
    assert_eq!((after.state(), &after.json["record"]), ("published", &before.json["record"]));
    broker.eventually("the broker is ready again", || async { broker.get("/readyz").await.status == 200 }).await;
    // Now the object of the upload that really failed is removed, and no other.
    broker.eventually("one object is left", || async { broker.objects().await.len() == 1 }).await;
    assert_eq!(broker.only_record().await.1, b"hello");
    let history = broker.get(&format!("/lfs/uploads/{}/history", done.id())).await.expect(200);
    let last = history.json["items"].as_array().unwrap().last().unwrap().clone();
    assert_eq!((&last["from"], &last["to"], &last["by"]), (&json!("expired"), &json!("published"), &json!("audit")));
    assert_clean(&broker).await;
}

#[tokio::test]
async fn nothing_is_deleted_while_kafka_lists_no_marker_topic_although_batches_were_sent() {
    let mut broker = TestBroker::start().await;
    broker.publish(b"hello", json!({"key": "k"})).await;
    let failed = broker.open_and_put(b"taken back", json!({})).await;
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    // A Kafka that has just come back: it answers, but does not know its topics yet.
    let blank = lfs_broker_embedded::kafka::Server::start().unwrap();
    broker.restart(|settings| settings.kafka.bootstrap_servers = blank.bootstrap_servers()).await;
    broker.delete(&format!("/lfs/uploads/{}", failed.id())).await.expect(204);
    broker.wait_for_cleanups(&failed.id()).await;
    assert_eq!(broker.objects().await.len(), 2);
    broker.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    broker.eventually("the aborted upload's object is removed", || async { broker.objects().await.len() == 1 }).await;
}

#[tokio::test]
async fn an_upload_aborted_in_a_restored_database_is_published_again_and_holds_no_quota() {
    let broker = TestBroker::start().await;
    let done = broker.publish(b"hello", json!({"key": "k"})).await;
    broker.restore_backup().await;
    broker.delete(&format!("/lfs/uploads/{}", done.id())).await.expect(204);
    broker.wait_for_cleanups(&done.id()).await;
    assert_eq!(broker.run_audit(true).await.finding(FindingKind::KafkaAhead).map(|finding| finding.fixed), Some(1));
    assert_eq!(broker.upload(&done.id()).await.state(), "published");
    assert_eq!(broker.tenant_usage().await, (0, 0));
    assert_eq!(broker.only_record().await.1, b"hello");
    assert_clean(&broker).await;
}
