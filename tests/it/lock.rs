//! A bucket whose Object Lock keeps each object for a day.

use serde_json::json;

use crate::faults::faulty;
use crate::harness::House;
use crate::harness::proxy::FaultyS3;
use crate::harness::servers::servers;
use crate::stores::Flavour;

async fn locked_house(s3: &FaultyS3) -> House {
    let endpoint = s3.endpoint();
    s3.lock_objects();
    House::with(|settings| settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint)).await
}

/// The start waits for the probe, though not for ever.
async fn is_tried_out(house: &House) {
    let is_tried = async || house.get("/readyz").await.json["capabilities"].is_object();
    house.eventually("the bucket was tried out", is_tried).await;
}

#[tokio::test]
async fn a_probe_of_a_bucket_with_object_lock_leaves_the_same_few_objects_however_often_it_starts() {
    let s3 = faulty().await;
    let mut house = locked_house(&s3).await;
    is_tried_out(&house).await;
    let answer = house.get("/readyz").await.expect(200);
    assert_eq!(answer.json["capabilities"]["object_lock"], true, "{}", answer.text);
    let left = house.objects().await;
    assert!(left.contains(&".lfs-broker-probe/kept/honest".to_owned()) && left.len() < 10, "{left:?}");
    for _ in 0..2 {
        house.restart(|_| {}).await;
        is_tried_out(&house).await;
        assert_eq!(house.objects().await, left);
    }
    assert_eq!(s3.refused_deletes(), 0, "nothing was tried in vain");
    house.publish(b"hello", json!({})).await;
}

#[tokio::test]
async fn a_broker_with_tokens_starts_on_a_bucket_with_object_lock() {
    let s3 = faulty().await;
    s3.lock_objects();
    let endpoint = s3.endpoint();
    // Without a signing credential the start waits for the probe's outcome, unless the store is one that copies.
    let is_lax = servers().s3.flavour == Flavour::Minio;
    let house = House::with_tokens(|settings| {
        settings.objects.public_endpoint = settings.objects.endpoint.replace(endpoint);
        settings.objects.allow_copy_source = is_lax;
    })
    .await;
    house.get("/readyz").await.expect(200);
}

#[tokio::test]
async fn what_object_lock_keeps_is_swept_when_its_retention_ends_and_not_in_each_pass() {
    let s3 = faulty().await;
    let house = locked_house(&s3).await;
    let opened = house.put_up(b"hello", json!({})).await;
    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    let due = "select cleanup_due_at > now() + interval '23 hours' from upload_sessions";
    let is_put_off = async || sqlx::query_scalar::<_, Option<bool>>(due).fetch_one(&house.db).await.unwrap() == Some(true);
    house.eventually("the next try is at the end of the retention", is_put_off).await;
    assert_eq!(s3.refused_deletes(), 1);
}
