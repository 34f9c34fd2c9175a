//! What KafScale's readers make of our records. This reader follows their published rules, and where the seven of them
//! differ, the strictest: whatever it takes, each of them takes. It shares no code with ours.

use serde_json::{Value, json};

use crate::harness::uploads::PART;
use crate::harness::{House, bytes, sha256};

/// The members that their envelope has; two of the readers refuse any other.
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

/// What a reader makes of a record's value: the bytes, or why it gives none.
async fn read(house: &House, value: &[u8]) -> Result<Vec<u8>, String> {
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
    let needed = |name: &str| text(name).ok_or(format!("no {name}"));
    if members["kfs_lfs"] != json!(1) {
        return Err("another version".to_owned());
    }
    if let Some(algorithm) = text("checksum_alg").filter(|name| !["sha256", "none"].contains(name)) {
        return Err(format!("unknown checksum_alg {algorithm}"));
    }
    let size = members.get("size").and_then(Value::as_u64).ok_or("no size")?;
    let (bucket, key, expected) = (needed("bucket")?, needed("key")?, needed("sha256")?);
    let object = house.s3.get_object().bucket(bucket).key(key).send().await.map_err(|error| format!("{error:?}"))?;
    let found = object.body.collect().await.map_err(|error| error.to_string())?.to_vec();
    // Hashes are compared as text, as they stand.
    match found.len() as u64 == size && sha256(&found) == expected {
        true => Ok(found),
        false => Err("other bytes".to_owned()),
    }
}

#[tokio::test]
async fn a_reader_by_kafscales_rules_gets_the_bytes_of_every_kind_of_upload() {
    let house = House::new().await;
    let large = bytes(2 * PART + 9, 1);
    let hostile =
        json!({"key": "\"kfs", "content_type": "text/plain; charset=\"utf-8\"", "filename": "ü.txt", "headers": {"a": "b"}});
    house.publish(b"in one put", hostile).await;
    house.publish(b"", json!({"sha256": sha256(b"").to_uppercase()})).await;
    let read_again = house.put_up(&large, json!({"part_size": PART})).await;
    house.complete_and_wait(&read_again.id(), json!({})).await;
    let hashed = house.open_hashed_parts(&large, json!({})).await.expect(201);
    house.put_parts(&hashed.json["parts"], &large).await;
    house.complete_and_wait(&hashed.id(), json!({})).await;

    let mut got = Vec::new();
    for record in house.records(&house.topic).await {
        got.push(read(&house, &record.value).await.unwrap_or_else(|error| panic!("{error}: {}", record.json())));
    }
    got.sort_by_key(Vec::len);
    assert!(got == [Vec::new(), b"in one put".to_vec(), large.clone(), large]);
}

#[tokio::test]
async fn a_pointer_without_sha256_is_refused_by_kafscales_rules_and_never_taken_for_data() {
    let house = House::new().await;
    house.put_policy(&house.topic, &json!({"checksums": ["crc32"], "min_integrity": "checksum"})).await.expect(200);
    let more = json!({"sha256": null, "checksum_alg": "crc32", "checksum": "cbf43926"});
    house.publish(b"123456789", more).await;
    let record = house.only_record().await.0;
    assert_eq!(read(&house, &record.value).await, Err("unknown checksum_alg crc32".to_owned()));
}
