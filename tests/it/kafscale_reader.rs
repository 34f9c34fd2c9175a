//! How KafScale's readers read our records. This reader follows their published rules, and the strictest rule where the
//! seven readers differ: each of them accepts what this one accepts. It shares no code with the broker or its client.

use serde_json::{Value, json};

use crate::harness::uploads::PART_BYTES;
use crate::harness::{TestBroker, bytes, sha256};

/// The members of a KafScale envelope. Two of the readers refuse any other member.
const MEMBERS: [&str; 11] = [
    "kfs_lfs",
    "bucket",
    "key",
    "size",
    "sha256",
    "checksum",
    "checksum_alg",
    "content_type",
    "original_headers",
    "created_at",
    "proxy_id",
];

/// What a reader returns for a record's value: the bytes, or why it fails.
async fn read(broker: &TestBroker, value: &[u8]) -> Result<Vec<u8>, String> {
    let beginning = &value[..value.len().min(50)];
    let marked = beginning.windows(9).any(|window| window == b"\"kfs_lfs\"");
    if value.len() < 15 || value[0] != b'{' || !marked {
        return Ok(value.to_vec());
    }
    let envelope: Value = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    let members = envelope.as_object().ok_or("no object")?;
    if let Some(other) = members.keys().find(|name| !MEMBERS.contains(&name.as_str())) {
        return Err(format!("unknown member {other}"));
    }
    let text = |name: &str| members.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    let required = |name: &str| text(name).ok_or(format!("no {name}"));
    if members["kfs_lfs"] != json!(1) {
        return Err("another version".to_owned());
    }
    if let Some(algorithm) = text("checksum_alg").filter(|name| !["sha256", "none"].contains(name)) {
        return Err(format!("unknown checksum_alg {algorithm}"));
    }
    let size = members.get("size").and_then(Value::as_u64).ok_or("no size")?;
    let (bucket, key, expected) = (required("bucket")?, required("key")?, required("sha256")?);
    let object = broker.s3.get_object().bucket(bucket).key(key).send().await.map_err(|error| format!("{error:?}"))?;
    let found = object.body.collect().await.map_err(|error| error.to_string())?.to_vec();
    // The readers compare hashes as text, without changing their case.
    match found.len() as u64 == size && sha256(&found) == expected {
        true => Ok(found),
        false => Err("other bytes".to_owned()),
    }
}

#[tokio::test]
async fn a_reader_with_kafscales_rules_gets_the_bytes_of_every_kind_of_upload() {
    let broker = TestBroker::start().await;
    let large = bytes(2 * PART_BYTES + 9, 1);
    let special_characters =
        json!({"key": "\"kfs", "content_type": "text/plain; charset=\"utf-8\"", "filename": "ü.txt", "headers": {"a": "b"}});
    broker.publish(b"in one put", special_characters).await;
    broker.publish(b"", json!({"sha256": sha256(b"").to_uppercase()})).await;
    let read_back = broker.open_and_put(&large, json!({"part_size": PART_BYTES})).await;
    broker.complete_and_wait(&read_back.id(), json!({})).await;
    let hashed = broker.open_multipart_with_hashes(&large, json!({})).await.expect(201);
    broker.put_parts(&hashed.json["parts"], &large).await;
    broker.complete_and_wait(&hashed.id(), json!({})).await;

    let mut contents = Vec::new();
    for record in broker.records(&broker.topic).await {
        contents.push(read(&broker, &record.value).await.unwrap_or_else(|error| panic!("{error}: {}", record.json())));
    }
    contents.sort_by_key(Vec::len);
    assert!(contents == [Vec::new(), b"in one put".to_vec(), large.clone(), large]);
}

#[tokio::test]
async fn a_pointer_without_sha256_is_an_error_for_kafscales_readers_and_never_treated_as_data() {
    let broker = TestBroker::start().await;
    broker.put_policy(&broker.topic, &json!({"checksums": ["crc32"], "min_integrity": "checksum"})).await.expect(200);
    let more = json!({"sha256": null, "checksum_alg": "crc32", "checksum": "cbf43926"});
    broker.publish(b"123456789", more).await;
    let record = broker.only_record().await.0;
    assert_eq!(read(&broker, &record.value).await, Err("unknown checksum_alg crc32".to_owned()));
}
