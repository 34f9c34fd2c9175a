//! The limits that the OpenAPI document names are those that the broker and the client enforce.

use lfs_broker_client::api::{MAX_OBJECT_BYTES, MAX_PART_BYTES, MAX_PARTS, MIN_PART_BYTES, PARTS_PER_CALL, is_valid_filename};
use serde_json::{Value, json};

use crate::harness::TestBroker;

#[test]
fn the_document_names_the_limits_of_the_shared_module() {
    let document = serde_json::to_value(lfs_broker::http::openapi()).unwrap();
    let member = |schema: &str, member: &str| document["components"]["schemas"][schema]["properties"][member].clone();
    let limits = |member: Value, names: [&str; 2]| names.map(|name| member[name].as_u64().unwrap_or_default());
    assert_eq!(limits(member("OpenUpload", "part_size"), ["minimum", "maximum"]), [MIN_PART_BYTES, MAX_PART_BYTES]);
    assert_eq!(limits(member("OpenUpload", "size"), ["minimum", "maximum"]), [0, MAX_OBJECT_BYTES]);
    assert_eq!(limits(member("OpenUpload", "part_sha256"), ["minItems", "maxItems"]), [1, MAX_PARTS]);
    assert_eq!(limits(member("PartRequest", "part_number"), ["minimum", "maximum"]), [1, MAX_PARTS]);
    assert_eq!(limits(member("Policy", "max_bytes"), ["minimum", "maximum"]), [0, MAX_OBJECT_BYTES]);
    let parts_per_call = u64::try_from(PARTS_PER_CALL).unwrap();
    assert_eq!(limits(member("SignParts", "part_numbers"), ["minItems", "maxItems"]), [1, parts_per_call]);
}

/// The client omits a file name that the broker would refuse, so both must decide alike.
#[tokio::test]
async fn the_broker_accepts_exactly_the_file_names_that_the_client_sends() {
    let broker = TestBroker::start().await;
    for name in ["a", "...", "Zoë 1.mp4", &"x".repeat(255), "", ".", "..", "a/b", "a\\b", "a\tb", "a\u{85}", &"x".repeat(256)] {
        let opened = broker.open(b"x", json!({"filename": name})).await;
        assert_eq!(opened.status == 201, is_valid_filename(name), "{name:?}: {}", opened.text);
    }
}
