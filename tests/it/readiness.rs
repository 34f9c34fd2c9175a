//! A broker is ready only while an upload would work, and says what is wrong.

use serde_json::{Value, json};

use crate::faults::faulty;
use crate::harness::{Answer, House};

/// Asks until the broker answers with this status, for a check that goes on in the background.
async fn ready(house: &House, status: u16) -> Answer {
    for _ in 0..150 {
        let answer = house.get("/readyz").await;
        if answer.status == status {
            return answer;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("/readyz never answered {status}: {}", house.get("/readyz").await.text);
}

#[track_caller]
fn assert_reason(part: &Value, words: &str) {
    let reason = part["reason"].as_str().unwrap_or_default();
    assert!(part["ok"] == false && reason.contains(words), "{words:?} is not the reason: {part}");
}

#[tokio::test]
async fn a_broker_whose_signing_secret_is_wrong_is_not_ready() {
    let house = House::with(|settings| {
        settings.objects.signing_access_key_id = settings.objects.access_key_id.clone();
        settings.objects.signing_secret_access_key = Some("another secret, long enough".to_owned());
    })
    .await;
    let answer = ready(&house, 503).await;
    assert_reason(&answer.json["storage"], "a signed PUT to bucket");
    assert_reason(&answer.json["storage"], "SignatureDoesNotMatch");
    let stats = house.get("/lfs/stats").await.expect(200);
    assert_eq!(stats.json["dependencies"]["storage"], answer.json["storage"]);
}

#[tokio::test]
async fn a_broker_whose_clock_is_twenty_minutes_off_is_not_ready_and_says_by_how_much() {
    let s3 = faulty().await;
    s3.set_clock_ahead(1203);
    let house = House::with(|settings| settings.objects.endpoint = Some(s3.endpoint())).await;
    let answer = ready(&house, 503).await;
    assert_reason(&answer.json["storage"], "the clock differs from the store's by 1,20");
    assert_reason(&answer.json["storage"], "(ours is behind)");
    s3.set_clock_ahead(0);
    ready(&house, 200).await;
    house.publish(b"hello", json!({})).await;
}

#[tokio::test]
async fn a_broker_whose_bucket_does_not_exist_is_not_ready_and_names_it() {
    let house = House::with(|settings| settings.objects.bucket = Some("it-nobody-made-this".to_owned())).await;
    let answer = ready(&house, 503).await;
    assert_reason(&answer.json["storage"], "bucket it-nobody-made-this does not exist");
}

#[tokio::test]
async fn a_broker_whose_database_is_read_only_is_not_ready() {
    let house = House::new().await;
    house.get("/readyz").await.expect(200);
    let name: String = sqlx::query_scalar("select current_database()").fetch_one(&house.db).await.unwrap();
    let read_only = format!("alter database {name} set default_transaction_read_only = on");
    sqlx::raw_sql(sqlx::AssertSqlSafe(read_only)).execute(&house.db).await.unwrap();
    // As a failover to a standby ends the old connections.
    let end = "select pg_terminate_backend(pid) from pg_stat_activity
               where datname = current_database() and application_name = 'lfs-broker'";
    sqlx::query(end).execute(&house.db).await.unwrap();
    // The connections that were ended may be noticed first.
    let is_named = async || {
        let database = &house.get("/readyz").await.expect(503).json["database"];
        database["reason"].as_str().is_some_and(|reason| reason.contains("the database is read-only"))
    };
    ready(&house, 503).await;
    house.eventually("the cause is named", is_named).await;
}
