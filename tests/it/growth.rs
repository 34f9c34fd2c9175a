//! What no quota counts does not grow, and what a URL may still bring is counted.

use std::time::Duration;

use serde_json::{Value, json};

use crate::audit::is_clean;
use crate::harness::uploads::{PART, part_hashes};
use crate::harness::{House, bytes};

impl House {
    async fn count(&self, statement: &'static str) -> i64 {
        sqlx::query_scalar(statement).fetch_one(&self.db).await.unwrap()
    }
}

#[tokio::test]
async fn an_upload_that_failed_keeps_no_part_hashes_and_a_published_one_does() {
    const PARTS: &str = "select count(*) from upload_parts";
    let house = House::new().await;
    let content = bytes(PART + 9, 1);
    let published = house.put_up(&content, json!({"part_size": PART, "part_sha256": part_hashes(&content, PART)})).await;
    house.complete(&published.id()).await.expect(200);
    let many: Vec<String> = (0..1000).map(|number: u32| crate::harness::sha256(&number.to_be_bytes())).collect();
    let more = json!({"size": 1000 * PART as u64, "sha256": null, "part_size": PART, "part_sha256": many});
    let aborted = house.open(b"", more).await.expect(201);
    assert_eq!(house.count(PARTS).await, 1002);
    house.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    house.eventually("its hashes are gone", || async { house.count(PARTS).await == 2 }).await;
    // What is published may be proved again by them, where its object was written anew.
    house.post(&format!("/lfs/uploads/{}/reverify", published.id()), &json!({})).await.expect(200);
}

#[tokio::test]
async fn a_history_does_not_grow_with_completes_that_come_too_early() {
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    for _ in 0..20 {
        house.complete(&id).await.expect_problem(409, "object-missing");
    }
    // A history is folded after whoever waited has heard.
    let rows =
        async || house.get(&format!("/lfs/uploads/{id}/history")).await.expect(200).json["items"].as_array().unwrap().len();
    house.eventually("the first round and the last are left", async || rows().await == 5).await;
}

#[tokio::test]
async fn a_history_has_pages_and_an_end() {
    // Of both uploads.
    const HISTORY: &str = "select count(*) from upload_history";
    let house = House::new().await;
    let id = house.open(b"hello", json!({})).await.expect(201).id();
    let other = house.open(b"hello", json!({})).await.expect(201).id();
    // As many different transitions as no test can wait for.
    sqlx::query(
        "insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
         select $1::uuid, number, clock_timestamp(), 'open', 'open', 'number ' || number, 'test' from generate_series(2, 1200) number",
    )
    .bind(&id)
    .execute(&house.db)
    .await
    .unwrap();
    let grown = sqlx::query("update upload_sessions set version = 1200 where id = $1::uuid").bind(&id);
    grown.execute(&house.db).await.unwrap();
    house.complete(&id).await.expect_problem(409, "object-missing");
    house.eventually("what is above the limit is gone", || async { house.count(HISTORY).await == 1001 }).await;

    let path = format!("/lfs/uploads/{id}/history");
    let (mut read, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = house.get(&format!("{path}?limit=300{cursor}")).await.expect(200).json;
        read.extend(page["items"].as_array().unwrap().clone());
        let Some(next) = page["next_cursor"].as_str() else { break };
        assert_eq!(page["items"].as_array().unwrap().len(), 300);
        cursor = format!("&cursor={next}");
    }
    assert_eq!(read.len(), 1000);
    assert_eq!((&read[0]["from"], &read[0]["to"]), (&Value::Null, &json!("open")), "how it began is kept");
    assert_eq!((&read[998]["to"], &read[999]["to"]), (&json!("completing"), &json!("open")), "and how it went on");
    assert_eq!(house.get(&path).await.expect(200).json["items"].as_array().unwrap().len(), 200);
    for bad in ["limit=0", "limit=1001", "limit=x", "cursor=x", "nonsense=1"] {
        house.get(&format!("{path}?{bad}")).await.expect_problem(422, "validation-failed");
    }
    let foreign = format!("/lfs/uploads/{other}/history?{}", cursor.trim_start_matches('&'));
    house.get(&foreign).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn what_a_live_url_may_still_bring_is_counted_and_swept_when_the_url_has_ended() {
    const BYTES: usize = 1000;
    let house = House::with(|settings| settings.broker.quota.reserved_bytes = 2 * BYTES as i64).await;
    let content = bytes(BYTES, 4);
    let mut opened = Vec::new();
    // The sessions and their bytes are free at once. But the URLs can still bring the bytes: twice the quota, and no more.
    for _ in 0..4 {
        let upload = house.open(&content, json!({})).await.expect(201);
        house.delete(&format!("/lfs/uploads/{}", upload.id())).await.expect(204);
        opened.push(upload);
        assert_eq!(house.quota().await, (0, 0));
    }
    house.open(&content, json!({})).await.expect_problem(429, "quota-bytes-exceeded");
    is_clean(&house).await;
    house
        .eventually("the first pass is over", || async {
            let next = "select count(*) from upload_sessions where cleanup_due_at > clock_timestamp() + interval '5 minutes'";
            house.count(next).await == 4
        })
        .await;
    for upload in &opened {
        house.put(&upload.json["upload"], &content).await.expect(200);
    }
    assert_eq!(house.objects().await.len(), 4);
    house.push_clock(Duration::from_secs(900 + 60));
    house.eventually("no URL is left", || async { house.count("select sum(held_bytes)::bigint from tenants").await == 0 }).await;
    house.eventually("they are swept", || async { house.objects().await.is_empty() }).await;
    house.open(&content, json!({})).await.expect(201);
    is_clean(&house).await;
}

#[tokio::test]
async fn parts_of_an_aborted_upload_are_free_at_once() {
    let house = House::new().await;
    let opened = house.open_parts(&bytes(PART + 9, 5), json!({})).await.expect(201);
    house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    assert_eq!(house.quota().await, (0, 0));
}
