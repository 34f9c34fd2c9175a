//! Object stores that accept an unsigned `x-amz-copy-source`: added to a presigned PUT, this header would give a tenant
//! every object that the broker may read. A broker with tokens refuses to start on such a store.

use lfs_broker::{app, auth};
use serde_json::json;

use crate::harness::fault_proxy::FaultyS3;
use crate::harness::servers::servers;
use crate::harness::tokens::token;
use crate::harness::{ApiResponse, TestBroker};
use crate::s3_server::Flavour;

async fn start_s3_that_copies() -> FaultyS3 {
    let s3 = FaultyS3::in_front_of(&servers().s3.endpoint).await;
    s3.ignore_copy_source_header();
    s3
}

/// Starts a broker with tokens and without a default bucket, which must not trust such a store.
async fn start_without_bucket(endpoint: Option<String>) -> TestBroker {
    TestBroker::start_with_tokens(|settings| {
        settings.objects.allow_copy_source = false;
        settings.objects.endpoint = endpoint.or(settings.objects.endpoint.take());
        settings.objects.bucket = None;
    })
    .await
}

async fn put_policy(broker: &TestBroker, bucket: &str) -> ApiResponse {
    let policy = broker.request("PUT", &format!("/lfs/topics/{}", broker.topic)).bearer_auth(token("acme", "lfs:admin", &[]));
    broker.send(policy.json(&json!({"bucket": bucket}))).await
}

#[tokio::test]
async fn a_broker_with_tokens_starts_only_on_a_store_that_refuses_an_unsigned_copy_source() {
    let s3 = start_s3_that_copies().await;
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let mut settings = broker.settings.clone();
    settings.objects.endpoint = Some(s3.endpoint());
    settings.objects.allow_copy_source = false;
    let refused = app::start(settings.clone()).await.err().expect("the broker does not start");
    assert!(matches!(refused, app::Error::CopySource), "{refused}");

    // Without a default bucket the policies name the buckets to probe.
    put_policy(&broker, &broker.bucket).await.expect(200);
    settings.objects.bucket = None;
    let refused = app::start(settings.clone()).await.err().expect("the broker does not start");
    assert!(matches!(refused, app::Error::CopySource), "{refused}");

    let write_only = |settings: &mut app::Settings| {
        settings.objects.signing_access_key_id = settings.objects.access_key_id.clone();
        settings.objects.signing_secret_access_key = settings.objects.secret_access_key.clone();
    };
    let safe_settings: [&dyn Fn(&mut app::Settings); 3] =
        [&|settings| settings.objects.allow_copy_source = true, &write_only, &|settings| {
            settings.auth = auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() }
        }];
    for change in safe_settings {
        let mut settings = settings.clone();
        change(&mut settings);
        app::start(settings).await.expect("the broker starts").stop().await;
    }
}

#[tokio::test]
async fn without_a_default_bucket_the_first_policy_that_names_a_bucket_has_it_probed() {
    let s3 = start_s3_that_copies().await;
    let broker = start_without_bucket(Some(s3.endpoint())).await;
    let refused = put_policy(&broker, &broker.bucket).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["errors"][0]["pointer"], "/bucket", "{}", refused.text);
    let open = broker.request("POST", "/lfs/uploads").bearer_auth(token("acme", "lfs:write", &["*"]));
    let open = open.json(&json!({"topic": broker.topic, "size": 0}));
    assert!(broker.send(open).await.status >= 400, "there is no bucket");

    let broker = start_without_bucket(None).await;
    let copies = servers().s3.flavour == Flavour::Minio;
    put_policy(&broker, &broker.bucket).await.expect(if copies { 422 } else { 200 });
}
