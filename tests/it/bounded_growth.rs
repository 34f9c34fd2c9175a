//! Data that no quota counts does not grow without limit, and bytes that a live URL may still bring are counted.

use std::time::Duration;

use serde_json::{Value, json};

use crate::audit::assert_clean;
use crate::harness::uploads::{PART_BYTES, part_hashes};
use crate::harness::{TestBroker, bytes};

impl TestBroker {
    async fn count(&self, statement: &'static str) -> i64 {
        sqlx::query_scalar(statement).fetch_one(&self.db).await.unwrap()
    }
}

#[tokio::test]
async fn an_aborted_upload_loses_its_part_hashes_and_a_published_one_keeps_them() {
    const PARTS: &str = "select count(*) from upload_parts";
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 9, 1);
    let published =
        broker.open_and_put(&content, json!({"part_size": PART_BYTES, "part_sha256": part_hashes(&content, PART_BYTES)})).await;
    broker.complete(&published.id()).await.expect(200);
    let many: Vec<String> = (0..1000).map(|number: u32| crate::harness::sha256(&number.to_be_bytes())).collect();
    let more = json!({"size": 1000 * PART_BYTES as u64, "sha256": null, "part_size": PART_BYTES, "part_sha256": many});
    let aborted = broker.open(b"", more).await.expect(201);
    assert_eq!(broker.count(PARTS).await, 1002);
    broker.delete(&format!("/lfs/uploads/{}", aborted.id())).await.expect(204);
    broker.eventually("the part hashes are deleted", || async { broker.count(PARTS).await == 2 }).await;
    // The part hashes are needed to verify a published object again that was rewritten.
    broker.post(&format!("/lfs/uploads/{}/reverify", published.id()), &json!({})).await.expect(200);
}

#[tokio::test]
async fn early_completes_do_not_grow_the_history_without_limit() {
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    for _ in 0..20 {
        broker.complete(&id).await.expect_problem(409, "object-missing");
    }
    // The history is compacted only after the client has its response.
    let rows =
        async || broker.get(&format!("/lfs/uploads/{id}/history")).await.expect(200).json["items"].as_array().unwrap().len();
    broker.eventually("the first and the last round are kept", async || rows().await == 5).await;
}

#[tokio::test]
async fn the_history_has_pages_and_a_limit() {
    // Of both uploads.
    const HISTORY: &str = "select count(*) from upload_history";
    let broker = TestBroker::start().await;
    let id = broker.open(b"hello", json!({})).await.expect(201).id();
    let other = broker.open(b"hello", json!({})).await.expect(201).id();
    // More distinct transitions than a test can make through the API.
    sqlx::query(
        "insert into upload_history (session_id, version, at, from_state, to_state, reason, by)
         select $1::uuid, number, clock_timestamp(), 'open', 'open', 'number ' || number, 'test' from generate_series(2, 1200) number",
    )
    .bind(&id)
    .execute(&broker.db)
    .await
    .unwrap();
    let raise_version = sqlx::query("update upload_sessions set version = 1200 where id = $1::uuid").bind(&id);
    raise_version.execute(&broker.db).await.unwrap();
    broker.complete(&id).await.expect_problem(409, "object-missing");
    broker.eventually("rows above the limit are deleted", || async { broker.count(HISTORY).await == 1001 }).await;

    let path = format!("/lfs/uploads/{id}/history");
    let (mut read, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = broker.get(&format!("{path}?limit=300{cursor}")).await.expect(200).json;
        read.extend(page["items"].as_array().unwrap().clone());
        let Some(next) = page["next_cursor"].as_str() else { break };
        assert_eq!(page["items"].as_array().unwrap().len(), 300);
        cursor = format!("&cursor={next}");
    }
    assert_eq!(read.len(), 1000);
    assert_eq!((&read[0]["from"], &read[0]["to"]), (&Value::Null, &json!("open")), "the first transition is kept");
    assert_eq!((&read[998]["to"], &read[999]["to"]), (&json!("completing"), &json!("open")), "the last transitions are kept");
    assert_eq!(broker.get(&path).await.expect(200).json["items"].as_array().unwrap().len(), 200);
    for bad in ["limit=0", "limit=1001", "limit=x", "cursor=x", "nonsense=1"] {
        broker.get(&format!("{path}?{bad}")).await.expect_problem(422, "validation-failed");
    }
    let foreign = format!("/lfs/uploads/{other}/history?{}", cursor.trim_start_matches('&'));
    broker.get(&foreign).await.expect_problem(422, "validation-failed");
}

#[tokio::test]
async fn bytes_that_a_live_url_may_still_bring_are_counted_and_removed_when_the_url_has_expired() {
    const BYTES: usize = 1000;
    let broker = TestBroker::start_with(|settings| settings.broker.quota.reserved_bytes = 2 * BYTES as i64).await;
    let content = bytes(BYTES, 4);
    let mut opened = Vec::new();
    // Sessions and bytes are released at once. But the live URLs can still bring the bytes: up to twice the quota.
    for _ in 0..4 {
        let upload = broker.open(&content, json!({})).await.expect(201);
        broker.delete(&format!("/lfs/uploads/{}", upload.id())).await.expect(204);
        opened.push(upload);
        assert_eq!(broker.tenant_usage().await, (0, 0));
    }
    broker.open(&content, json!({})).await.expect_problem(429, "quota-bytes-exceeded");
    assert_clean(&broker).await;
    broker
        .eventually("the first cleanup is done", || async {
            let next = "select count(*) from upload_sessions where cleanup_due_at > clock_timestamp() + interval '5 minutes'";
            broker.count(next).await == 4
        })
        .await;
    for upload in &opened {
        broker.put(&upload.json["upload"], &content).await.expect(200);
    }
    assert_eq!(broker.objects().await.len(), 4);
    broker.advance_clock(Duration::from_secs(900 + 60));
    broker
        .eventually("no live URL is left", || async { broker.count("select sum(held_bytes)::bigint from tenants").await == 0 })
        .await;
    broker.eventually("the objects are removed", || async { broker.objects().await.is_empty() }).await;
    broker.open(&content, json!({})).await.expect(201);
    assert_clean(&broker).await;
}

#[tokio::test]
async fn the_quota_of_an_aborted_multipart_upload_is_released_at_once() {
    let broker = TestBroker::start().await;
    let opened = broker.open_multipart(&bytes(PART_BYTES + 9, 5), json!({})).await.expect(201);
    broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(204);
    assert_eq!(broker.tenant_usage().await, (0, 0));
}
