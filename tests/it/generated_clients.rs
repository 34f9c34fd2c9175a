//! What generators of clients need from the OpenAPI document, and what their clients send.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::harness::TestBroker;

fn document() -> Value {
    serde_json::to_value(lfs_broker::http::openapi()).unwrap()
}

/// Every operation of the document with its id.
fn operations(document: &Value) -> Vec<(&str, &Value)> {
    let paths = document["paths"].as_object().unwrap().values();
    let operations = paths.flat_map(|path| path.as_object().unwrap().values());
    operations.map(|operation| (operation["operationId"].as_str().unwrap(), operation)).collect()
}

/// Every text of the document: descriptions, examples, defaults.
fn texts<'a>(value: &'a Value, found: &mut Vec<(&'a str, &'a str)>) {
    for (name, member) in value.as_object().into_iter().flatten() {
        match member.as_str() {
            Some(text) => found.push((name, text)),
            None => texts(member, found),
        }
    }
    value.as_array().into_iter().flatten().for_each(|item| texts(item, found));
}

#[test]
fn no_description_ends_a_comment_in_generated_code() {
    let document = document();
    let mut found = Vec::new();
    texts(&document, &mut found);
    let descriptions = found.iter().filter(|(name, _)| ["description", "summary", "title"].contains(name));
    let bad: Vec<_> = descriptions.filter(|(_, text)| text.contains("*/") || text.contains("/*")).collect();
    assert!(bad.is_empty(), "{bad:?}");
    assert!(found.len() > 500, "only {} texts were checked", found.len());
}

#[test]
fn the_values_of_all_enums_have_different_names() {
    let document = document();
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    for (schema, definition) in document["components"]["schemas"].as_object().unwrap() {
        let Some(values) = definition["enum"].as_array() else { continue };
        let given = definition["x-enum-varnames"].as_array().unwrap_or(values);
        assert_eq!(given.len(), values.len(), "{schema}: each value has one name");
        for name in given {
            let name = name.as_str().unwrap().to_uppercase().replace('-', "_");
            if let Some(other) = names.insert(name.clone(), schema) {
                panic!("{other} and {schema} both have a value {name}, which openapi-generator's Go client declares twice");
            }
        }
    }
    assert!(names.len() > 60, "only {} values were compared", names.len());
}

#[test]
fn every_operation_documents_the_errors_that_it_may_answer() {
    let document = document();
    for (id, operation) in operations(&document) {
        let responses = operation["responses"].as_object().unwrap();
        let has = |status: &str| responses.contains_key(status);
        assert!(has("4XX"), "{id}");
        if operation["security"].is_null() {
            assert!(["401", "403", "429", "500", "503"].into_iter().all(has), "{id}: {:?}", responses.keys());
        }
        assert!(operation["requestBody"].is_null() || ["400", "415", "422"].into_iter().all(has), "{id}");
        for (status, response) in responses {
            match status.as_str() {
                "429" | "503" => assert_eq!(response["headers"]["Retry-After"]["schema"]["type"], "integer", "{id} {status}"),
                "401" => assert!(response["headers"]["WWW-Authenticate"].is_object(), "{id}"),
                _ => {}
            }
        }
    }
    let described = |id: &str, status: &str| {
        let (_, operation) = operations(&document).into_iter().find(|(found, _)| *found == id).unwrap();
        operation["responses"][status]["description"].as_str().unwrap().to_owned()
    };
    assert_eq!(described("completeUpload", "409"), "`object-missing`, `parts-incomplete`, `state-conflict`");
    assert_eq!(described("openUpload", "429"), "`quota-bytes-exceeded`, `quota-sessions-exceeded`, `rate-limited`");
    let meanings = document["components"]["schemas"]["ErrorCode"]["description"].as_str().unwrap();
    for (status, code) in crate::problems::CODES {
        assert!(meanings.contains(&format!("| `{code}` | {status} |")), "{code}");
    }
}

#[test]
fn the_document_has_what_linters_require() {
    let document = document();
    assert_eq!(document["servers"], json!([{"url": "/", "description": "The broker that serves this document"}]));
    assert!(document["info"]["contact"]["name"].is_string() && document["info"]["license"]["identifier"].is_string());
    let tags: BTreeSet<&str> = document["tags"].as_array().unwrap().iter().filter_map(|tag| tag["name"].as_str()).collect();
    for (id, operation) in operations(&document) {
        assert!(operation["tags"].as_array().unwrap().iter().all(|tag| tags.contains(tag.as_str().unwrap())), "{id}");
    }
}

#[tokio::test]
async fn behind_a_prefix_the_served_document_names_the_prefix_as_its_server() {
    let broker = TestBroker::start_with(|settings| settings.public_url = Some("https://x.example/api/".to_owned())).await;
    assert_eq!(broker.get("/openapi.json").await.expect(200).json["servers"][0]["url"], "/api");
}

/// The members of a pointer in the order of `names`; other members follow in their own order.
fn reordered(pointer: &Map<String, Value>, names: &[&str]) -> String {
    let rest = pointer.keys().map(String::as_str).filter(|name| !names.contains(name));
    let members: Vec<String> =
        names.iter().copied().chain(rest).map(|name| format!("{}:{}", json!(name), pointer[name])).collect();
    format!("{{{}}}", members.join(","))
}

#[tokio::test]
async fn a_pointer_resolves_with_its_members_in_any_order() {
    let broker = TestBroker::start().await;
    let opened = broker.open(b"hello", json!({"key": "k", "content_type": "video/mp4"})).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let done = broker.complete(&opened.id()).await.expect(200).json;
    let pointer = done["pointer"].as_object().unwrap();
    let names: BTreeSet<&str> = pointer.keys().map(String::as_str).collect();
    let example = document()["components"]["schemas"]["Pointer"]["example"].clone();
    let in_document: Vec<&str> = example.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(in_document.iter().copied().collect::<BTreeSet<_>>(), names, "the example has the members of a real pointer");
    // Go's json.Marshal and `jq -S` sort the members by name.
    let sorted: Vec<&str> = names.into_iter().collect();
    let reversed: Vec<&str> = sorted.iter().rev().copied().collect();
    for order in [&in_document, &sorted, &reversed] {
        let body = reordered(pointer, order);
        let resolved = broker.send_json("POST", "/lfs/resolve", body.clone().into_bytes()).await.expect(200);
        assert_eq!(resolved.json["sha256"], pointer["sha256"], "{body}");
    }
    // `jq -S .` also adds white space.
    let pretty = serde_json::to_vec_pretty(pointer).unwrap();
    broker.send_json("POST", "/lfs/resolve", pretty).await.expect(200);
    // The document's example names an object of another broker: it is understood and forbidden, not invalid.
    broker.send_json("POST", "/lfs/resolve", example.to_string().into_bytes()).await.expect_problem(403, "pointer-forbidden");
}

#[tokio::test]
async fn a_broker_that_is_not_ready_says_when_to_ask_again() {
    let broker = TestBroker::start_with(|settings| settings.objects.bucket = Some("it-nobody-made-this".to_owned())).await;
    for _ in 0..150 {
        let response = broker.get("/readyz").await;
        if response.status == 503 {
            assert_eq!(response.headers["retry-after"], "1");
            return;
        }
        // The readiness checks run in the background.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("/readyz never answered 503");
}
