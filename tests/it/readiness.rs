//! A broker is ready only while an upload would succeed, and otherwise reports what is wrong.

use lfs_broker::app;
use serde_json::{Value, json};

use crate::harness::{ApiResponse, TestBroker};
use crate::s3_faults::start_faulty_s3;

/// Waits until `/readyz` answers with this status, because its checks run in the background.
async fn wait_until_ready_is(broker: &TestBroker, status: u16) -> ApiResponse {
    for _ in 0..150 {
        let response = broker.get("/readyz").await;
        if response.status == status {
            return response;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("/readyz never answered {status}: {}", broker.get("/readyz").await.text);
}

#[track_caller]
fn assert_reason(part: &Value, words: &str) {
    let reason = part["reason"].as_str().unwrap_or_default();
    assert!(part["ok"] == false && reason.contains(words), "{words:?} is not the reason: {part}");
}

#[tokio::test]
async fn a_broker_with_a_wrong_signing_secret_is_not_ready() {
    let broker = TestBroker::start_with(|settings| {
        settings.objects.signing_access_key_id = settings.objects.access_key_id.clone();
        settings.objects.signing_secret_access_key = Some("another secret, long enough".to_owned());
    })
    .await;
    let response = wait_until_ready_is(&broker, 503).await;
    assert_reason(&response.json["storage"], "a signed PUT to bucket");
    assert_reason(&response.json["storage"], "SignatureDoesNotMatch");
    let stats = broker.get("/lfs/stats").await.expect(200);
    assert_eq!(stats.json["dependencies"]["storage"], response.json["storage"]);
}

#[tokio::test]
async fn a_broker_whose_clock_is_twenty_minutes_off_is_not_ready_and_reports_the_difference() {
    let s3 = start_faulty_s3().await;
    s3.set_clock_ahead(1203);
    let broker = TestBroker::start_with(|settings| settings.objects.endpoint = Some(s3.endpoint())).await;
    let response = wait_until_ready_is(&broker, 503).await;
    assert_reason(&response.json["storage"], "the clock differs from the store's by 1,20");
    assert_reason(&response.json["storage"], "(ours is behind)");
    s3.set_clock_ahead(0);
    wait_until_ready_is(&broker, 200).await;
    broker.publish(b"hello", json!({})).await;
}

#[tokio::test]
async fn a_broker_whose_bucket_does_not_exist_is_not_ready_and_names_the_bucket() {
    let broker = TestBroker::start_with(|settings| settings.objects.bucket = Some("it-nobody-made-this".to_owned())).await;
    let response = wait_until_ready_is(&broker, 503).await;
    assert_reason(&response.json["storage"], "bucket it-nobody-made-this does not exist");
}

#[tokio::test]
async fn a_broker_whose_database_is_read_only_is_not_ready() {
    let broker = TestBroker::start().await;
    broker.get("/readyz").await.expect(200);
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&broker.db).await.unwrap();
    let read_only = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::raw_sql(sqlx::AssertSqlSafe(read_only)).execute(&broker.db).await.unwrap();
    // A failover to a standby ends the old connections too.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and application_name = 'lfs-broker'";
    sqlx::query(end).execute(&broker.db).await.unwrap();
    // The broker may report the closed connections first.
    let is_named = async || {
        let database = &broker.get("/readyz").await.expect(503).json["database"];
        database["reason"].as_str().is_some_and(|reason| reason.contains("the database is read-only"))
    };
    wait_until_ready_is(&broker, 503).await;
    broker.eventually("the cause is named", is_named).await;
}

#[tokio::test]
async fn a_broker_without_a_bucket_names_the_missing_setting_and_not_the_store() {
    let broker = TestBroker::start().await;
    let mut settings = broker.settings.clone();
    settings.objects.bucket = None;
    settings.objects.endpoint = Some("http://127.0.0.1:1".to_owned());
    let running = app::start(settings).await.expect("the broker starts");
    let response = reqwest::get(format!("http://{}/readyz", running.address())).await.unwrap();
    assert_eq!(response.status(), 503);
    let readiness: Value = serde_json::from_str(&response.text().await.unwrap()).unwrap();
    assert_reason(&readiness["storage"], "no bucket is configured: set LFS_BROKER_S3_BUCKET");
    running.stop().await;
}

#[tokio::test]
async fn a_broker_whose_kafka_address_is_wrong_does_not_name_an_advertised_address() {
    let broker = TestBroker::start_with(|settings| settings.kafka.bootstrap_servers = "127.0.0.1:1".to_owned()).await;
    let has_reason = async || {
        let response = broker.get("/readyz").await.expect(200);
        let reason = response.json["kafka"]["reason"].as_str().unwrap_or_default().to_owned();
        reason == "an address in KAFKA_BOOTSTRAP_SERVERS cannot be reached; the log contains it"
    };
    broker.eventually("the cause is named", has_reason).await;
}
