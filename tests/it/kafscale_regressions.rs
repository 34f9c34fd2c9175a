//! One test per fault of KafScale's proxy, the only comparable product: every uploaded byte went through it, and its
//! sessions were only in memory. (The test for its unbounded metric labels is beside the metrics.)

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::harness::servers::{delete_topic, servers};
use crate::harness::tokens::token;
use crate::harness::uploads::PART_BYTES;
use crate::harness::{ApiResponse, Record, TestBroker, bytes, sha256};

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

/// The record that a response names.
fn record_of<'a>(records: &'a [Record], response: &ApiResponse) -> &'a Record {
    let position = &response.json["record"];
    let found = records
        .iter()
        .find(|record| json!(record.partition) == position["partition"] && json!(record.offset) == position["offset"]);
    let record = found.unwrap_or_else(|| panic!("no record at {position}"));
    assert_eq!(record.header("lfs-upload-id"), Some(response.id().as_str()));
    assert_eq!(record.json(), response.json["pointer"]);
    record
}

#[tokio::test]
async fn a_topic_that_kafka_lacks_is_never_answered_200() {
    let broker = TestBroker::start().await;
    broker.open(b"hello", json!({"topic": "nowhere"})).await.expect_problem(404, "topic-not-found");
    assert_eq!(broker.get("/lfs/uploads").await.json["items"], json!([]));
}

#[tokio::test]
#[ignore = "needs a real Kafka: .ci/run runs it"]
async fn a_topic_that_is_deleted_after_open_is_never_answered_200() {
    assert!(servers().real_kafka, "the embedded Kafka cannot delete a topic");
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_secs(2)).await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    delete_topic(&broker.topic).await;
    // No replica may use cached metadata of the deleted topic.
    broker.restart(|_| {}).await;
    for _ in 0..2 {
        let response = broker.complete_until_verified(&opened.id()).await.expect(202);
        assert_eq!(response.state(), "verified");
    }
    broker.create_topic(&broker.topic, 3).await;
    broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(broker.only_record().await.1, b"hello");
}

#[tokio::test]
async fn every_200_is_a_record_in_kafka() {
    let broker = TestBroker::start().await;
    let responses = join_all((0..20).map(|number: usize| {
        let broker = &broker;
        async move { broker.publish(format!("upload {number}").as_bytes(), json!({"partition": number % 3})).await }
    }))
    .await;
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 20);
    for (number, response) in responses.iter().enumerate() {
        assert_eq!(record_of(&records, response).partition as usize, number % 3);
    }
}

#[tokio::test]
async fn a_record_has_the_current_time() {
    let broker = TestBroker::start().await;
    let before = now_ms();
    let done = broker.publish(b"hello", json!({})).await;
    let after = now_ms();
    let (record, _) = broker.only_record().await;
    assert!((before..=after).contains(&record.timestamp_ms), "{before} {} {after}", record.timestamp_ms);
    let timestamp = done.json["record"]["timestamp"].as_str().unwrap();
    let timestamp = time::OffsetDateTime::parse(timestamp, &time::format_description::well_known::Rfc3339).unwrap();
    assert_eq!(timestamp.unix_timestamp_nanos() / 1_000_000, i128::from(record.timestamp_ms));
}

#[tokio::test]
async fn a_part_that_was_sent_twice_is_hashed_once() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 7, 31);
    for hashed in [true, false] {
        let opened = match hashed {
            true => broker.open_multipart_with_hashes(&content, json!({})).await.expect(201),
            false => broker.open_multipart(&content, json!({})).await.expect(201),
        };
        broker.put_parts(&opened.json["parts"], &content).await;
        broker.put_parts(&opened.json["parts"], &content).await;
        let published = broker.complete_and_wait(&opened.id(), json!({})).await;
        let pointer = &published.json["pointer"];
        assert_eq!((&pointer["sha256"], &pointer["size"]), (&json!(sha256(&content)), &json!(content.len())));
    }
    for record in broker.records(&broker.topic).await {
        let resolved = broker.resolve(&record.value, "").await.expect(200);
        assert!(broker.download(&resolved.json).await == content);
    }
}

#[tokio::test]
async fn complete_with_one_of_two_parts_is_refused() {
    let broker = TestBroker::start().await;
    let content = bytes(2 * PART_BYTES, 32);
    for only in 0..2 {
        let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
        broker.put(&opened.json["parts"][only], &content[only * PART_BYTES..(only + 1) * PART_BYTES]).await.expect(200);
        let refused = broker.complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
        assert_eq!(refused.json["errors"][0]["pointer"], format!("/parts/{}", 1 - only));
    }
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
    assert_eq!(broker.objects().await, Vec::<String>::new());
}

/// `org.apache.kafka.common.utils.Utils.murmur2`.
fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c ^ key.len() as u32;
    let words = key.chunks_exact(4);
    let rest = words.remainder();
    for word in words {
        let mut word = u32::from_le_bytes(word.try_into().unwrap()).wrapping_mul(M);
        word = (word ^ (word >> 24)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ word;
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[tokio::test]
async fn keys_are_partitioned_like_javas_default_partitioner() {
    // From Kafka's own UtilsTest.
    for (key, expected) in
        [("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536), ("abc", 479470107)]
    {
        assert_eq!(murmur2(key.as_bytes()) as i32, expected, "{key}");
    }
    let broker = TestBroker::start().await;
    let keys = [
        "21",
        "foobar",
        "a-little-bit-long-string",
        "abc",
        "order-17",
        "",
        "Zoë",
        "x",
        "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
    ];
    join_all(keys.iter().map(|key| broker.publish(key.as_bytes(), json!({"key": key})))).await;
    broker.publish(b"bytes", json!({"key_base64": "/wD+"})).await;
    broker.publish(b"asked", json!({"key": "21", "partition": ((murmur2(b"21") & 0x7fff_ffff) as i32 % 3) ^ 1})).await;
    let records = broker.records(&broker.topic).await;
    let by_key = |key: &[u8]| -> Vec<i32> {
        records.iter().filter(|record| record.key.as_deref() == Some(key)).map(|record| record.partition).collect()
    };
    let expected = |key: &[u8]| (murmur2(key) & 0x7fff_ffff) as i32 % 3;
    for key in keys.iter().skip(1).map(|key| key.as_bytes()).chain([b"\xff\x00\xfe".as_slice()]) {
        assert_eq!(by_key(key), [expected(key)], "{key:?}");
    }
    // Two records have this key; the second was sent to an explicit partition.
    assert_eq!(by_key(b"21").into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([expected(b"21"), expected(b"21") ^ 1]));
    assert_eq!(records.iter().map(|record| record.partition).collect::<BTreeSet<_>>().len(), 3);
}

#[tokio::test]
async fn kafka_down_at_complete_costs_no_second_upload() {
    let mut broker = TestBroker::start_with(|settings| settings.broker.complete_wait = Duration::from_secs(1)).await;
    let opened = broker.open(b"hello", json!({"key": "k"})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let kafka = broker.settings.kafka.bootstrap_servers.clone();
    // Port 9 is the discard service; no server listens there.
    broker.restart(|settings| settings.kafka.bootstrap_servers = "127.0.0.1:9".to_owned()).await;
    let mut pointer = None;
    for _ in 0..2 {
        let response = broker.complete_until_verified(&opened.id()).await.expect(202);
        assert_eq!((response.state(), response.json["integrity"].as_str()), ("verified", Some("sha256")));
        assert!(response.headers.contains_key("retry-after"));
        assert_eq!(pointer.get_or_insert(response.json["pointer"].clone()), &response.json["pointer"]);
    }
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
    broker.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let published = broker.wait_for_state(&opened.id(), "published").await;
    assert_eq!(Some(&published.json["pointer"]), pointer.as_ref());
    assert_eq!(broker.only_record().await.1, b"hello");
}

#[tokio::test]
async fn a_lost_response_and_a_retry_make_one_record() {
    let broker = TestBroker::start().await;
    let body = json!({"topic": broker.topic, "size": 5, "sha256": sha256(b"hello")});
    let open = || {
        let request = broker.http.post(format!("{}/lfs/uploads", broker.url())).header("idempotency-key", "order-17");
        broker.send(request.json(&body))
    };
    let first = open().await.expect(201);
    let opened = open().await.expect(200);
    assert_eq!(opened.id(), first.id());
    broker.put(&opened.json["upload"], b"hello").await.expect(200);

    // The client does not read the response of this complete.
    let address = broker.url().replace("http://", "");
    let mut connection = tokio::net::TcpStream::connect(&address).await.unwrap();
    let request = format!("POST /lfs/uploads/{}/complete HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\n\r\n", opened.id());
    connection.write_all(request.as_bytes()).await.unwrap();
    broker.wait_for_state(&opened.id(), "published").await;
    drop(connection);
    let done = broker.complete(&opened.id()).await.expect(200);
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 1);
    record_of(&records, &done);

    // The client disconnects while the broker completes.
    let opened = broker.open(b"again", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"again").await.expect(200);
    let mut connection = tokio::net::TcpStream::connect(&address).await.unwrap();
    let request = request.replace(&first.id(), &opened.id());
    connection.write_all(request.as_bytes()).await.unwrap();
    drop(connection);
    let done = broker.complete(&opened.id()).await.expect(200);
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 2);
    record_of(&records, &done);
}

#[tokio::test]
async fn complete_twice_returns_the_same_response() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let id = opened.id();
    let concurrent = join_all((0..8).map(|_| broker.complete(&id))).await;
    let later = broker.complete(&id).await.expect(200);
    for response in concurrent {
        assert_eq!(response.expect(200).json, later.json);
    }
    let listed = broker.complete_with(&id, json!({"parts": [{"part_number": 1, "etag": "\"x\""}]})).await.expect(200);
    assert_eq!(listed.json, later.json);
    let records = broker.records(&broker.topic).await;
    assert_eq!(records.len(), 1);
    record_of(&records, &later);
}

#[tokio::test]
async fn a_checksum_mismatch_leaves_no_object() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 7, 33);
    let wrong = json!({"sha256": sha256(b"something else")});
    let parts = broker.open_multipart(&content, wrong.clone()).await.expect(201);
    broker.put_parts(&parts.json["parts"], &content).await;
    let stream = broker.open(b"hello", json!({"sha256": null})).await.expect(201);
    broker.put(&stream.json["upload"], b"hello").await.expect(200);
    for opened in [&parts, &stream] {
        broker.complete_with(&opened.id(), wrong.clone()).await.expect_problem(422, "checksum-mismatch");
        broker
            .eventually("the object is removed", || async {
                !broker.objects().await.iter().any(|key| *key == opened.json["object_key"])
            })
            .await;
    }
    broker.wait_until_s3_is_empty(parts.json["object_key"].as_str().unwrap()).await;
    assert_eq!(broker.records(&broker.topic).await.len(), 0);
}

#[tokio::test]
async fn an_expired_session_leaves_no_parts() {
    let broker = TestBroker::start().await;
    let content = bytes(PART_BYTES + 7, 34);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    let key = opened.json["object_key"].as_str().unwrap();
    broker.put_parts(&opened.json["parts"], &content).await;
    assert!(broker.has_open_multipart(key).await);
    broker.advance_clock(Duration::from_secs(3601));
    broker.wait_until_s3_is_empty(key).await;
    assert_eq!(broker.upload(&opened.id()).await.state(), "expired");
    broker.complete(&opened.id()).await.expect_problem(410, "upload-expired");
    broker.presign_parts(&opened.id(), json!({"part_numbers": [1]})).await.expect_problem(410, "upload-expired");
    assert_eq!(broker.put(&opened.json["parts"][1], &content[PART_BYTES..]).await.status, 404);
}

#[tokio::test]
async fn a_second_replica_serves_any_upload() {
    let broker = TestBroker::start().await;
    let replica = broker.replica().await;
    let other = |path: String| format!("http://{}{path}", replica.address());
    let content = bytes(PART_BYTES + 7, 35);
    let opened = broker.open_multipart(&content, json!({"part_hashes": "deferred"})).await.expect(201);
    let id = opened.id();
    let parts: Vec<Value> = content
        .chunks(PART_BYTES)
        .enumerate()
        .map(|(index, part)| json!({"part_number": index + 1, "sha256": sha256(part)}))
        .collect();
    let presign = |url: String, part: &Value| broker.send(broker.http.post(url).json(&json!({"parts": [part]})));
    let first = presign(other(format!("/lfs/uploads/{id}/parts")), &parts[0]).await.expect(200);
    let second = presign(format!("{}/lfs/uploads/{id}/parts", broker.url()), &parts[1]).await.expect(200);
    broker.put_parts(&first.json["parts"], &content).await;
    broker.put_parts(&second.json["parts"], &content).await;
    let read = broker.send(broker.http.get(other(format!("/lfs/uploads/{id}")))).await.expect(200);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("complete"), &json!([])));

    let complete = || broker.send(broker.http.post(other(format!("/lfs/uploads/{id}/complete"))));
    let (uploaded, here) = tokio::join!(complete(), broker.complete(&id));
    assert_eq!(uploaded.expect(200).json, here.expect(200).json);
    let (record, got) = broker.only_record().await;
    assert!(got == content);
    let resolve = broker.http.post(other("/lfs/resolve".to_owned())).header("content-type", "application/json");
    let resolved = broker.send(resolve.body(record.value)).await.expect(200);
    assert_eq!(resolved.json["upload_id"], json!(id));
    replica.stop().await;
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_multipart_upload_loses_nothing() {
    // The shards of a crashed relay are free once its lease has expired.
    let mut broker = TestBroker::start_with(|settings| settings.completion.lease = Duration::from_secs(3)).await;
    let content = bytes(2 * PART_BYTES + 7, 36);
    let opened = broker.open_multipart_with_hashes(&content, json!({"key": "k"})).await.expect(201);
    broker.put(&opened.json["parts"][1], &content[PART_BYTES..2 * PART_BYTES]).await.expect(200);
    broker.crash(|_| {}).await;
    let read = broker.upload(&opened.id()).await.expect(200);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("parts"), &json!([[1, 1], [3, 3]])));
    broker.put(&opened.json["parts"][0], &content[..PART_BYTES]).await.expect(200);
    broker.restart(|_| {}).await;
    let signed = broker.presign_parts(&opened.id(), json!({"part_numbers": [3]})).await.expect(200);
    broker.put_parts(&signed.json["parts"], &content).await;
    broker.complete(&opened.id()).await.expect(200);
    assert!(broker.only_record().await.1 == content);
}

#[tokio::test]
async fn uploaded_and_missing_parts_can_be_read() {
    let broker = TestBroker::start().await;
    let content = bytes(3 * PART_BYTES + 7, 37);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    let progress = || async {
        let read = broker.upload(&opened.id()).await.expect(200).json;
        (read["uploaded_parts"].clone(), read["missing_parts"].clone(), read["next"].clone())
    };
    assert_eq!(progress().await, (json!([]), json!([[1, 4]]), json!("parts")));
    broker.put(&opened.json["parts"][3], &content[3 * PART_BYTES..]).await.expect(200);
    broker.put(&opened.json["parts"][0], &content[..PART_BYTES]).await.expect(200);
    let uploaded = json!([{"part_number": 1, "size": PART_BYTES}, {"part_number": 4, "size": 7}]);
    assert_eq!(progress().await, (uploaded, json!([[2, 3]]), json!("parts")));
    broker.put_parts(&opened.json["parts"], &content).await;
    let (uploaded, missing, next) = progress().await;
    assert_eq!((uploaded.as_array().unwrap().len(), missing, next), (4, json!([]), json!("complete")));
}

#[tokio::test]
async fn parts_can_be_uploaded_in_any_order_and_concurrently() {
    let broker = TestBroker::start().await;
    let content = bytes(4 * PART_BYTES, 38);
    let opened = broker.open_multipart_with_hashes(&content, json!({})).await.expect(201);
    broker.put(&opened.json["parts"][3], &content[3 * PART_BYTES..]).await.expect(200);
    let (broker, content, parts) = (&broker, &content, &opened.json["parts"]);
    join_all([2, 0, 1].map(|index: usize| async move {
        broker.put(&parts[index], &content[index * PART_BYTES..(index + 1) * PART_BYTES]).await.expect(200);
    }))
    .await;
    broker.complete(&opened.id()).await.expect(200);
    assert!(broker.only_record().await.1 == *content);
}

#[tokio::test]
async fn a_topic_takes_no_uploads_until_it_is_enabled() {
    let broker = TestBroker::start_with(|settings| settings.policy.default_enabled = false).await;
    broker.open(b"hello", json!({})).await.expect_problem(403, "topic-not-enabled");
    broker.put_policy(&broker.topic, &json!({})).await.expect(200);
    broker.publish(b"hello", json!({})).await;
    broker.put_policy(&broker.topic, &json!({"enabled": false})).await.expect(200);
    broker.open(b"hello", json!({})).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn requests_for_hundreds_of_unknown_topics_do_not_harm_the_broker() {
    let broker = TestBroker::start().await;
    let progress = (0..500).map(|number| {
        let broker = &broker;
        async move {
            let topic = format!("flood-{number}");
            broker.get(&format!("/lfs/topics/{topic}")).await.expect_problem(404, "topic-not-found");
            broker.get(&format!("/lfs/{topic}")).await.expect_problem(404, "not-found");
        }
    });
    join_all(progress).await;
    broker.get("/healthz").await.expect(200);
    broker.publish(b"still here", json!({})).await;
}

#[tokio::test]
async fn a_token_is_valid_only_for_its_own_tenant_and_topics() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let token = |tenant: &str, topic: &str| token(tenant, "lfs:write lfs:read", &[topic]);
    let open = |token: String| {
        let request = broker.http.post(format!("{}/lfs/uploads", broker.url())).bearer_auth(token);
        broker.send(request.json(&json!({"topic": broker.topic, "size": 0})))
    };
    let opened = open(token("acme", &broker.topic)).await.expect(201);
    open(token("acme", "another")).await.expect_problem(403, "topic-forbidden");
    let read =
        |token: String| broker.send(broker.http.get(format!("{}/lfs/uploads/{}", broker.url(), opened.id())).bearer_auth(token));
    read(token("acme", &broker.topic)).await.expect(200);
    read(token("other", &broker.topic)).await.expect_problem(404, "upload-not-found");
    broker.upload(&opened.id()).await.expect_problem(401, "unauthenticated");
}
