//! What the one shipped peer gets wrong, each fault a test: every byte of its uploads went through itself, and its
//! sessions lived in memory. (Its unbounded metric labels have their test beside the metrics.)

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::harness::servers::{delete_topic, servers};
use crate::harness::tokens::token;
use crate::harness::uploads::PART;
use crate::harness::{Answer, House, Record, bytes, sha256};

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

/// The record that an upload's answer speaks of.
fn record_of<'a>(records: &'a [Record], answer: &Answer) -> &'a Record {
    let place = &answer.json["record"];
    let found =
        records.iter().find(|record| json!(record.partition) == place["partition"] && json!(record.offset) == place["offset"]);
    let record = found.unwrap_or_else(|| panic!("no record at {place}"));
    assert_eq!(record.header("lfs-upload-id"), Some(answer.id().as_str()));
    assert_eq!(record.json(), answer.json["pointer"]);
    record
}

#[tokio::test]
async fn a_topic_that_kafka_lacks_is_never_answered_200() {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::from_secs(2)).await;
    house.open(b"hello", json!({"topic": "nowhere"})).await.expect_problem(404, "topic-not-found");
    assert_eq!(house.get("/lfs/uploads").await.json["items"], json!([]));
    if !servers().real_kafka {
        return; // The embedded Kafka cannot lose a topic.
    }
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    delete_topic(&house.topic).await;
    // No replica may go on with what it knew of the topic.
    house.restart(|_| {}).await;
    for _ in 0..2 {
        let answer = house.complete(&opened.id()).await.expect(202);
        assert_eq!(answer.state(), "verified");
    }
    house.make_topic(&house.topic, 3).await;
    house.until(&opened.id(), "published").await;
    assert_eq!(house.only_record().await.1, b"hello");
}

#[tokio::test]
async fn every_200_is_a_record_on_kafka() {
    let house = House::new().await;
    let answers = join_all((0..20).map(|number: usize| {
        let house = &house;
        async move { house.publish(format!("upload {number}").as_bytes(), json!({"partition": number % 3})).await }
    }))
    .await;
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 20);
    for (number, answer) in answers.iter().enumerate() {
        assert_eq!(record_of(&records, answer).partition as usize, number % 3);
    }
}

#[tokio::test]
async fn a_record_carries_the_time_of_now() {
    let house = House::new().await;
    let before = now_ms();
    let done = house.publish(b"hello", json!({})).await;
    let after = now_ms();
    let (record, _) = house.only_record().await;
    assert!((before..=after).contains(&record.timestamp_ms), "{before} {} {after}", record.timestamp_ms);
    let told = done.json["record"]["timestamp"].as_str().unwrap();
    let told = time::OffsetDateTime::parse(told, &time::format_description::well_known::Rfc3339).unwrap();
    assert_eq!(told.unix_timestamp_nanos() / 1_000_000, i128::from(record.timestamp_ms));
}

#[tokio::test]
async fn a_part_sent_twice_is_hashed_once() {
    let house = House::new().await;
    let content = bytes(PART + 7, 31);
    for hashed in [true, false] {
        let opened = match hashed {
            true => house.open_hashed_parts(&content, json!({})).await.expect(201),
            false => house.open_parts(&content, json!({})).await.expect(201),
        };
        house.put_parts(&opened.json["parts"], &content).await;
        house.put_parts(&opened.json["parts"], &content).await;
        let published = house.complete_and_wait(&opened.id(), json!({})).await;
        let pointer = &published.json["pointer"];
        assert_eq!((&pointer["sha256"], &pointer["size"]), (&json!(sha256(&content)), &json!(content.len())));
    }
    for record in house.records(&house.topic).await {
        let resolved = house.resolve(&record.value, "").await.expect(200);
        assert!(house.download(&resolved.json).await == content);
    }
}

#[tokio::test]
async fn complete_with_one_of_two_parts_is_refused() {
    let house = House::new().await;
    let content = bytes(2 * PART, 32);
    for only in 0..2 {
        let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
        house.put(&opened.json["parts"][only], &content[only * PART..(only + 1) * PART]).await.expect(200);
        let refused = house.complete(&opened.id()).await.expect_problem(409, "parts-incomplete");
        assert_eq!(refused.json["errors"][0]["pointer"], format!("/parts/{}", 1 - only));
    }
    assert_eq!(house.records(&house.topic).await.len(), 0);
    assert_eq!(house.objects().await, Vec::<String>::new());
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
async fn keys_spread_over_partitions_as_javas_partitioner_does() {
    // From Kafka's own UtilsTest.
    for (key, expected) in
        [("21", -973932308), ("foobar", -790332482), ("a-little-bit-long-string", -985981536), ("abc", 479470107)]
    {
        assert_eq!(murmur2(key.as_bytes()) as i32, expected, "{key}");
    }
    let house = House::new().await;
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
    join_all(keys.iter().map(|key| house.publish(key.as_bytes(), json!({"key": key})))).await;
    house.publish(b"bytes", json!({"key_base64": "/wD+"})).await;
    house.publish(b"asked", json!({"key": "21", "partition": ((murmur2(b"21") & 0x7fff_ffff) as i32 % 3) ^ 1})).await;
    let records = house.records(&house.topic).await;
    let by_key = |key: &[u8]| -> Vec<i32> {
        records.iter().filter(|record| record.key.as_deref() == Some(key)).map(|record| record.partition).collect()
    };
    let expected = |key: &[u8]| (murmur2(key) & 0x7fff_ffff) as i32 % 3;
    for key in keys.iter().skip(1).map(|key| key.as_bytes()).chain([b"\xff\x00\xfe".as_slice()]) {
        assert_eq!(by_key(key), [expected(key)], "{key:?}");
    }
    // Of the two with one key, one was sent where its producer wished.
    assert_eq!(by_key(b"21").into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([expected(b"21"), expected(b"21") ^ 1]));
    assert_eq!(records.iter().map(|record| record.partition).collect::<BTreeSet<_>>().len(), 3);
}

#[tokio::test]
async fn kafka_down_at_complete_costs_no_second_upload() {
    let mut house = House::with(|settings| settings.broker.complete_wait = Duration::from_secs(1)).await;
    let opened = house.open(b"hello", json!({"key": "k"})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let kafka = house.settings.kafka.bootstrap_servers.clone();
    // Port 9 is discard: nobody listens.
    house.restart(|settings| settings.kafka.bootstrap_servers = "127.0.0.1:9".to_owned()).await;
    let mut promised = None;
    for _ in 0..2 {
        let answer = house.complete(&opened.id()).await.expect(202);
        assert_eq!((answer.state(), answer.json["integrity"].as_str()), ("verified", Some("sha256")));
        assert!(answer.headers.contains_key("retry-after"));
        assert_eq!(promised.get_or_insert(answer.json["pointer"].clone()), &answer.json["pointer"]);
    }
    assert_eq!(house.records(&house.topic).await.len(), 0);
    house.restart(|settings| settings.kafka.bootstrap_servers = kafka).await;
    let published = house.until(&opened.id(), "published").await;
    assert_eq!(Some(&published.json["pointer"]), promised.as_ref());
    assert_eq!(house.only_record().await.1, b"hello");
}

#[tokio::test]
async fn a_lost_reply_and_a_retry_make_one_record() {
    let house = House::new().await;
    let body = json!({"topic": house.topic, "size": 5, "sha256": sha256(b"hello")});
    let open = || {
        let request = house.http.post(format!("{}/lfs/uploads", house.url())).header("idempotency-key", "order-17");
        house.send(request.json(&body))
    };
    let lost = open().await.expect(201);
    let opened = open().await.expect(200);
    assert_eq!(opened.id(), lost.id());
    house.put(&opened.json["upload"], b"hello").await.expect(200);

    // Nobody reads the answer to this one.
    let address = house.url().replace("http://", "");
    let mut line = tokio::net::TcpStream::connect(&address).await.unwrap();
    let request = format!("POST /lfs/uploads/{}/complete HTTP/1.1\r\nhost: {address}\r\ncontent-length: 0\r\n\r\n", opened.id());
    line.write_all(request.as_bytes()).await.unwrap();
    house.until(&opened.id(), "published").await;
    drop(line);
    let done = house.complete(&opened.id()).await.expect(200);
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 1);
    record_of(&records, &done);

    // And whoever asks goes away while the broker is at work.
    let opened = house.open(b"again", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"again").await.expect(200);
    let mut line = tokio::net::TcpStream::connect(&address).await.unwrap();
    let request = request.replace(&lost.id(), &opened.id());
    line.write_all(request.as_bytes()).await.unwrap();
    drop(line);
    let done = house.complete(&opened.id()).await.expect(200);
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 2);
    record_of(&records, &done);
}

#[tokio::test]
async fn complete_twice_gives_the_same_answer() {
    let house = House::new().await;
    let opened = house.open(b"hello", json!({})).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let id = opened.id();
    let at_once = join_all((0..8).map(|_| house.complete(&id))).await;
    let later = house.complete(&id).await.expect(200);
    for answer in at_once {
        assert_eq!(answer.expect(200).json, later.json);
    }
    let listed = house.complete_with(&id, json!({"parts": [{"part_number": 1, "etag": "\"x\""}]})).await.expect(200);
    assert_eq!(listed.json, later.json);
    let records = house.records(&house.topic).await;
    assert_eq!(records.len(), 1);
    record_of(&records, &later);
}

#[tokio::test]
async fn a_checksum_mismatch_leaves_no_object() {
    let house = House::new().await;
    let content = bytes(PART + 7, 33);
    let wrong = json!({"sha256": sha256(b"something else")});
    let parts = house.open_parts(&content, wrong.clone()).await.expect(201);
    house.put_parts(&parts.json["parts"], &content).await;
    let stream = house.open(b"hello", json!({"sha256": null})).await.expect(201);
    house.put(&stream.json["upload"], b"hello").await.expect(200);
    for opened in [&parts, &stream] {
        house.complete_with(&opened.id(), wrong.clone()).await.expect_problem(422, "checksum-mismatch");
        house
            .eventually("the object is removed", || async {
                !house.objects().await.iter().any(|key| *key == opened.json["object_key"])
            })
            .await;
    }
    house.until_nothing_is_left(parts.json["object_key"].as_str().unwrap()).await;
    assert_eq!(house.records(&house.topic).await.len(), 0);
}

#[tokio::test]
async fn an_expired_session_leaves_no_parts() {
    let house = House::new().await;
    let content = bytes(PART + 7, 34);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    let key = opened.json["object_key"].as_str().unwrap();
    house.put_parts(&opened.json["parts"], &content).await;
    assert!(house.has_open_multipart(key).await);
    house.push_clock(Duration::from_secs(3601));
    house.until_nothing_is_left(key).await;
    assert_eq!(house.upload(&opened.id()).await.state(), "expired");
    house.complete(&opened.id()).await.expect_problem(410, "upload-expired");
    house.sign(&opened.id(), json!({"part_numbers": [1]})).await.expect_problem(410, "upload-expired");
    assert_eq!(house.put(&opened.json["parts"][1], &content[PART..]).await.status, 404);
}

#[tokio::test]
async fn a_second_replica_serves_any_upload() {
    let house = House::new().await;
    let replica = house.replica().await;
    let other = |path: String| format!("http://{}{path}", replica.address());
    let content = bytes(PART + 7, 35);
    let opened = house.open_parts(&content, json!({"part_hashes": "deferred"})).await.expect(201);
    let id = opened.id();
    let parts: Vec<Value> =
        content.chunks(PART).enumerate().map(|(index, part)| json!({"part_number": index + 1, "sha256": sha256(part)})).collect();
    let sign = |url: String, part: &Value| house.send(house.http.post(url).json(&json!({"parts": [part]})));
    let first = sign(other(format!("/lfs/uploads/{id}/parts")), &parts[0]).await.expect(200);
    let second = sign(format!("{}/lfs/uploads/{id}/parts", house.url()), &parts[1]).await.expect(200);
    house.put_parts(&first.json["parts"], &content).await;
    house.put_parts(&second.json["parts"], &content).await;
    let read = house.send(house.http.get(other(format!("/lfs/uploads/{id}")))).await.expect(200);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("complete"), &json!([])));

    let complete = || house.send(house.http.post(other(format!("/lfs/uploads/{id}/complete"))));
    let (there, here) = tokio::join!(complete(), house.complete(&id));
    assert_eq!(there.expect(200).json, here.expect(200).json);
    let (record, got) = house.only_record().await;
    assert!(got == content);
    let resolve = house.http.post(other("/lfs/resolve".to_owned())).header("content-type", "application/json");
    let resolved = house.send(resolve.body(record.value)).await.expect(200);
    assert_eq!(resolved.json["upload_id"], json!(id));
    replica.stop().await;
}

#[tokio::test]
async fn a_restart_in_the_middle_of_a_multipart_costs_nothing() {
    // A crashed relay's shards are free when its lease has run out.
    let mut house = House::with(|settings| settings.finish.lease = Duration::from_secs(3)).await;
    let content = bytes(2 * PART + 7, 36);
    let opened = house.open_hashed_parts(&content, json!({"key": "k"})).await.expect(201);
    house.put(&opened.json["parts"][1], &content[PART..2 * PART]).await.expect(200);
    house.crash(|_| {}).await;
    let read = house.upload(&opened.id()).await.expect(200);
    assert_eq!((read.json["next"].as_str(), &read.json["missing_parts"]), (Some("parts"), &json!([[1, 1], [3, 3]])));
    house.put(&opened.json["parts"][0], &content[..PART]).await.expect(200);
    house.restart(|_| {}).await;
    let signed = house.sign(&opened.id(), json!({"part_numbers": [3]})).await.expect(200);
    house.put_parts(&signed.json["parts"], &content).await;
    house.complete(&opened.id()).await.expect(200);
    assert!(house.only_record().await.1 == content);
}

#[tokio::test]
async fn parts_that_arrived_can_be_asked_for() {
    let house = House::new().await;
    let content = bytes(3 * PART + 7, 37);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    let asked = || async {
        let read = house.upload(&opened.id()).await.expect(200).json;
        (read["uploaded_parts"].clone(), read["missing_parts"].clone(), read["next"].clone())
    };
    assert_eq!(asked().await, (json!([]), json!([[1, 4]]), json!("parts")));
    house.put(&opened.json["parts"][3], &content[3 * PART..]).await.expect(200);
    house.put(&opened.json["parts"][0], &content[..PART]).await.expect(200);
    let there = json!([{"part_number": 1, "size": PART}, {"part_number": 4, "size": 7}]);
    assert_eq!(asked().await, (there, json!([[2, 3]]), json!("parts")));
    house.put_parts(&opened.json["parts"], &content).await;
    let (uploaded, missing, next) = asked().await;
    assert_eq!((uploaded.as_array().unwrap().len(), missing, next), (4, json!([]), json!("complete")));
}

#[tokio::test]
async fn parts_go_up_in_any_order_and_at_once() {
    let house = House::new().await;
    let content = bytes(4 * PART, 38);
    let opened = house.open_hashed_parts(&content, json!({})).await.expect(201);
    house.put(&opened.json["parts"][3], &content[3 * PART..]).await.expect(200);
    let (house, content, parts) = (&house, &content, &opened.json["parts"]);
    join_all([2, 0, 1].map(|index: usize| async move {
        house.put(&parts[index], &content[index * PART..(index + 1) * PART]).await.expect(200);
    }))
    .await;
    house.complete(&opened.id()).await.expect(200);
    assert!(house.only_record().await.1 == *content);
}

#[tokio::test]
async fn a_topic_takes_no_uploads_until_somebody_enables_it() {
    let house = House::with(|settings| settings.policy.default_enabled = false).await;
    house.open(b"hello", json!({})).await.expect_problem(403, "topic-not-enabled");
    house.put_policy(&house.topic, &json!({})).await.expect(200);
    house.publish(b"hello", json!({})).await;
    house.put_policy(&house.topic, &json!({"enabled": false})).await.expect(200);
    house.open(b"hello", json!({})).await.expect_problem(403, "topic-not-enabled");
}

#[tokio::test]
async fn a_flood_of_names_leaves_the_broker_standing() {
    let house = House::new().await;
    let asked = (0..500).map(|number| {
        let house = &house;
        async move {
            let topic = format!("flood-{number}");
            house.get(&format!("/lfs/topics/{topic}")).await.expect_problem(404, "topic-not-found");
            house.get(&format!("/lfs/{topic}")).await.expect_problem(404, "not-found");
        }
    });
    join_all(asked).await;
    house.get("/healthz").await.expect(200);
    house.publish(b"still here", json!({})).await;
}

#[tokio::test]
async fn a_token_reaches_its_own_tenant_and_topics_only() {
    let house = House::with_tokens(|_| {}).await;
    let token = |tenant: &str, topic: &str| token(tenant, "lfs:write lfs:read", &[topic]);
    let open = |token: String| {
        let request = house.http.post(format!("{}/lfs/uploads", house.url())).bearer_auth(token);
        house.send(request.json(&json!({"topic": house.topic, "size": 0})))
    };
    let opened = open(token("acme", &house.topic)).await.expect(201);
    open(token("acme", "another")).await.expect_problem(403, "topic-forbidden");
    let read =
        |token: String| house.send(house.http.get(format!("{}/lfs/uploads/{}", house.url(), opened.id())).bearer_auth(token));
    read(token("acme", &house.topic)).await.expect(200);
    read(token("other", &house.topic)).await.expect_problem(404, "upload-not-found");
    house.upload(&opened.id()).await.expect_problem(401, "unauthenticated");
}
