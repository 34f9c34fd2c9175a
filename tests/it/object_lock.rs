//! A bucket whose Object Lock retains each object for a day.

use serde_json::json;

use crate::harness::TestBroker;
use crate::harness::fault_proxy::FaultyS3;
use crate::harness::servers::servers;
use crate::s3_faults::start_faulty_s3;
use crate::s3_server::Flavour;

async fn start_broker_with_object_lock(s3: &FaultyS3) -> TestBroker {
    let endpoint = s3.endpoint();
    s3.enable_object_lock();
    TestBroker::start_with(|settings| settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint)).await
}

/// Waits for the probe's result. The start waits for the probe only for a limited time.
async fn wait_for_probe(broker: &TestBroker) {
    let is_probed = async || broker.get("/readyz").await.json["capabilities"].is_object();
    broker.eventually("the bucket was probed", is_probed).await;
}

#[tokio::test]
async fn repeated_probes_of_a_bucket_with_object_lock_leave_the_same_few_objects() {
    let s3 = start_faulty_s3().await;
    let mut broker = start_broker_with_object_lock(&s3).await;
    wait_for_probe(&broker).await;
    let response = broker.get("/readyz").await.expect(200);
    assert_eq!(response.json["capabilities"]["object_lock"], true, "{}", response.text);
    let left = broker.objects().await;
    assert!(left.contains(&".lfs-broker-probe/kept/honest".to_owned()) && left.len() < 10, "{left:?}");
    for _ in 0..2 {
        broker.restart(|_| {}).await;
        wait_for_probe(&broker).await;
        assert_eq!(broker.objects().await, left);
    }
    assert_eq!(s3.refused_deletes(), 0, "no DELETE was refused");
    broker.publish(b"hello", json!({})).await;
}

#[tokio::test]
async fn a_broker_with_tokens_starts_on_a_bucket_with_object_lock() {
    let s3 = start_faulty_s3().await;
    s3.enable_object_lock();
    let endpoint = s3.endpoint();
    // Without a signing credential the start requires the probe's result, unless the store accepts an unsigned copy-source.
    let copies = servers().s3.flavour == Flavour::Minio;
    let broker = TestBroker::start_with_tokens(|settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
        settings.objects.allow_copy_source = copies;
    })
    .await;
    broker.get("/readyz").await.expect(200);
}

#[tokio::test]
async fn a_retained_object_is_removed_after_its_retention_and_not_tried_before() {
    let s3 = start_faulty_s3().await;
    let broker = start_broker_with_object_lock(&s3).await;
    let opened = broker.open_and_put(b"hello", json!({})).await;
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    let due = "select cleanup_due_at > now() + interval '23 hours' from upload_sessions";
    let is_deferred = async || sqlx::query_scalar::<_, Option<bool>>(due).fetch_one(&broker.db).await.unwrap() == Some(true);
    broker.eventually("the next cleanup is at the end of the retention", is_deferred).await;
    assert_eq!(s3.refused_deletes(), 1);
}
