//! A store that copies for whoever holds a URL: `x-amz-copy-source`, added to a signed PUT, would give a tenant what
//! the broker may read. Brokers with tokens keep away from it.

use lfs_broker::{app, auth};
use serde_json::json;

use crate::harness::proxy::FaultyS3;
use crate::harness::servers::servers;
use crate::harness::tokens::token;
use crate::harness::{Answer, House};
use crate::stores::Flavour;

async fn lax() -> FaultyS3 {
    let s3 = FaultyS3::before(&servers().s3.endpoint).await;
    s3.accept_copy_sources();
    s3
}

/// A house with tokens and without a default bucket, which must not trust such a store.
async fn guarded_house(endpoint: Option<String>) -> House {
    House::with_tokens(|settings| {
        settings.objects.allow_copy_source = false;
        settings.objects.endpoint = endpoint.or(settings.objects.endpoint.take());
        settings.objects.bucket = None;
    })
    .await
}

async fn put_policy(house: &House, bucket: &str) -> Answer {
    let policy = house.request("PUT", &format!("/lfs/topics/{}", house.topic)).bearer_auth(token("acme", "lfs:admin", &[]));
    house.send(policy.json(&json!({"bucket": bucket}))).await
}

#[tokio::test]
async fn brokers_with_tokens_start_only_on_a_store_that_refuses_a_copy_source() {
    let s3 = lax().await;
    let house = House::with_tokens(|_| {}).await;
    let mut settings = house.settings.clone();
    settings.objects.endpoint = Some(s3.endpoint());
    settings.objects.allow_copy_source = false;
    let refused = app::start(settings.clone()).await.err().expect("it does not start");
    assert!(matches!(refused, app::Error::CopySource), "{refused}");

    // Without a default bucket the policies say what may be written to.
    put_policy(&house, &house.bucket).await.expect(200);
    settings.objects.bucket = None;
    let refused = app::start(settings.clone()).await.err().expect("it does not start");
    assert!(matches!(refused, app::Error::CopySource), "{refused}");

    let write_only = |settings: &mut app::Settings| {
        settings.objects.signing_access_key_id = settings.objects.access_key_id.clone();
        settings.objects.signing_secret_access_key = settings.objects.secret_access_key.clone();
    };
    let ways: [&dyn Fn(&mut app::Settings); 3] =
        [&|settings| settings.objects.allow_copy_source = true, &write_only, &|settings| {
            settings.auth = auth::Settings { mode: auth::Mode::None, ..auth::Settings::default() }
        }];
    for way in ways {
        let mut settings = settings.clone();
        way(&mut settings);
        app::start(settings).await.expect("it starts").stop().await;
    }
}

#[tokio::test]
async fn without_a_bucket_at_the_start_the_first_policy_that_names_one_has_the_store_tried() {
    let s3 = lax().await;
    let house = guarded_house(Some(s3.endpoint())).await;
    let refused = put_policy(&house, &house.bucket).await.expect_problem(422, "validation-failed");
    assert_eq!(refused.json["errors"][0]["pointer"], "/bucket", "{}", refused.text);
    let open = house.request("POST", "/lfs/uploads").bearer_auth(token("acme", "lfs:write", &["*"]));
    let open = open.json(&json!({"topic": house.topic, "size": 0}));
    assert!(house.send(open).await.status >= 400, "there is no bucket");

    let house = guarded_house(None).await;
    let copies = servers().s3.flavour == Flavour::Minio;
    put_policy(&house, &house.bucket).await.expect(if copies { 422 } else { 200 });
}
