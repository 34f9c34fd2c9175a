//! The OpenAPI document: committed, served, complete and correct.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lfs_broker_client::api;
use lfs_broker_client::pointer::Pointer;
use serde_json::{Value, json};

use crate::harness::TestBroker;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn document() -> Value {
    serde_json::to_value(lfs_broker::http::openapi()).unwrap()
}

/// Every operation with its method and path.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    operations
}

/// The bodies of all requests and responses: operation, media type and content.
fn bodies(document: &Value) -> Vec<(String, String, Value)> {
    let mut bodies = Vec::new();
    for (method, path, operation) in operations(document) {
        let responses = operation["responses"].as_object().unwrap().values();
        for content in responses.chain([&operation["requestBody"]]).filter_map(|body| body["content"].as_object()) {
            bodies.extend(content.iter().map(|(kind, body)| (format!("{method} {path}"), kind.clone(), body.clone())));
        }
    }
    bodies
}

#[test]
fn the_committed_document_matches_the_handlers() {
    let path = root().join("openapi/openapi.json");
    let current = serde_json::to_string_pretty(&lfs_broker::http::openapi()).unwrap() + "\n";
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &current).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == current,
        "openapi/openapi.json is not current: UPDATE_OPENAPI=1 cargo test --test it openapi, and review the diff"
    );
}

#[tokio::test]
async fn the_served_document_is_the_committed_one() {
    let broker = TestBroker::start().await;
    let served = broker.get("/openapi.json").await.expect(200);
    assert_eq!(served.headers["content-type"], "application/json");
    assert_eq!(served.json, document());
    assert!(served.json["openapi"].as_str().unwrap().starts_with("3.1"));
}

/// The text from each `open` to the next `"`.
fn quoted<'a>(text: &'a str, open: &str) -> Vec<&'a str> {
    text.split(open).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn every_route_of_the_router_is_in_the_document() {
    let document = document();
    let documented: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    let mut routed = BTreeSet::new();
    let mut handlers = 0;
    for entry in std::fs::read_dir(root().join("src/http")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        handlers += text.matches("#[utoipa::path(").count();
        routed.extend(quoted(&text, "path = \"").into_iter().filter(|path| path.starts_with('/')).map(str::to_owned));
        routed.extend(quoted(&text, ".route(\"").into_iter().map(str::to_owned));
    }
    // The pages that show the document are not part of the API.
    routed.retain(|path| !path.starts_with("/docs"));
    assert_eq!(documented, routed.iter().map(String::as_str).collect());
    assert_eq!(operations(&document).len(), handlers);
    for path in [
        "/lfs/uploads",
        "/lfs/uploads/{id}",
        "/lfs/uploads/{id}/history",
        "/lfs/uploads/{id}/parts",
        "/lfs/uploads/{id}/complete",
    ] {
        assert!(documented.contains(path), "{path}");
    }
    for path in ["/lfs/resolve", "/lfs/topics", "/lfs/topics/{topic}", "/healthz", "/readyz", "/openapi.json", "/problems/{code}"]
    {
        assert!(documented.contains(path), "{path}");
    }
}

#[tokio::test]
async fn every_documented_operation_is_served() {
    let broker = TestBroker::start().await;
    for (method, path, _) in operations(&document()) {
        let path = path.replace("{id}", "x").replace("{topic}", "x").replace("{code}", "internal");
        let response = broker.send(broker.request(&method, &path)).await;
        assert!(!["not-found", "method-not-allowed"].contains(&response.code()), "{method} {path}: {}", response.text);
    }
}

#[test]
fn every_operation_has_an_id_of_its_own_and_a_description() {
    let document = document();
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
        assert!(ids.insert(id.to_owned()), "{id} occurs twice");
        assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
        for member in ["summary", "description"] {
            assert!(operation[member].as_str().is_some_and(|text| text.len() > 5), "{id} has no {member}");
        }
        assert_eq!(operation["tags"].as_array().unwrap().len(), 1, "{id}");
    }
}

#[test]
fn every_operation_with_a_token_documents_its_errors() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{method} {path}");
        if !path.starts_with("/lfs/") {
            assert_eq!(operation["security"], json!([{}]), "{method} {path} needs no token");
            continue;
        }
        assert!(operation["security"].is_null(), "{method} {path} needs what the document says");
        for status in ["4XX", "503"] {
            let problem = &responses[status]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path} {status}");
        }
    }
    assert_eq!(document["security"], json!([{"bearer": []}]));
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
}

#[test]
fn query_parameters_are_optional_and_document_their_limits() {
    for (method, path, operation) in operations(&document()) {
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let of_path = parameter["in"] == "path";
            assert_eq!(parameter["required"].as_bool().unwrap_or(false), of_path, "{method} {path}: {parameter}");
            match parameter["name"].as_str().unwrap() {
                "limit" => {
                    let most = if path.ends_with("/history") { 1000 } else { 200 };
                    assert_eq!((&parameter["schema"]["minimum"], &parameter["schema"]["maximum"]), (&json!(1), &json!(most)))
                }
                "wait" => assert_eq!(parameter["schema"]["maximum"], 30),
                _ => {}
            }
        }
    }
}

/// Parses the example of a schema as its Rust type.
fn assert_example_parses<T: serde::de::DeserializeOwned>(document: &Value, name: &str) {
    let example = &document["components"]["schemas"][name]["example"];
    assert!(example.is_object(), "{name} has no example");
    if let Err(error) = serde_json::from_value::<T>(example.clone()) {
        panic!("{name}'s example is invalid: {error}");
    }
}

/// Collects schemas that a generator could only call `any`, and members that may be both absent and null.
fn find_vague(schema: &Value, location: &str, found: &mut Vec<String>) {
    let Some(members) = schema.as_object() else { return };
    if !["type", "$ref", "oneOf", "allOf", "enum"].iter().any(|key| members.contains_key(*key)) {
        found.push(format!("{location} has no type"));
    }
    let open = members.get("type") == Some(&json!("object"));
    if open && !["properties", "additionalProperties"].iter().any(|key| members.contains_key(*key)) {
        found.push(format!("{location} is any object"));
    }
    for (name, member) in schema["properties"].as_object().into_iter().flatten() {
        let required = schema["required"].as_array().is_some_and(|names| names.contains(&json!(name)));
        let null = member["type"].as_array().is_some_and(|types| types.contains(&json!("null")))
            || member["oneOf"].as_array().is_some_and(|each| each.contains(&json!({"type": "null"})));
        let request = schema["additionalProperties"] == false;
        if null && !request && !required && member.get("default").is_none() {
            found.push(format!("{location}/{name} is absent or null"));
        }
        find_vague(member, &format!("{location}/{name}"), found);
    }
    for part in schema["oneOf"].as_array().into_iter().flatten() {
        if part.get("$ref").is_some() && part.as_object().is_some_and(|members| members.len() > 1) {
            found.push(format!("{location} has a reference that is more"));
        }
    }
    for (number, part) in ["oneOf", "allOf"].iter().filter_map(|key| schema[key].as_array()).flatten().enumerate() {
        find_vague(part, &format!("{location}/{number}"), found);
    }
    for key in ["items", "additionalProperties"] {
        find_vague(&schema[key], &format!("{location}/{key}"), found);
    }
}

#[test]
fn every_schema_has_a_definite_type() {
    let document = document();
    let mut found = Vec::new();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        find_vague(schema, name, &mut found);
    }
    for (location, _, body) in bodies(&document) {
        assert!(!body["schema"]["oneOf"].is_array(), "{location}: a schema without a name");
        find_vague(&body["schema"], &location, &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
    let mut all = Vec::new();
    find_vague(
        &json!({"type": "object", "properties": {"a": {}, "b": {"type": ["string", "null"]}, "c": {"type": "object"}}}),
        "x",
        &mut all,
    );
    assert_eq!(all, ["x/a has no type", "x/b is absent or null", "x/c is any object"]);
}

#[test]
fn the_responses_of_complete_can_be_told_apart() {
    let document = document();
    let schema = |name: &str| document["components"]["schemas"][name].clone();
    let responses = &document["paths"]["/lfs/uploads/{id}/complete"]["post"]["responses"];
    for status in ["200", "202"] {
        let body = &responses[status]["content"]["application/json"]["schema"]["$ref"];
        assert_eq!(body, "#/components/schemas/Completed", "a generated method often has one type for every answer");
    }
    for (name, state, required) in [
        ("Published", "published", json!(["id", "state", "pointer", "integrity", "record"])),
        ("Verified", "verified", json!(["id", "state", "pointer", "integrity"])),
        ("Completing", "completing", json!(["id", "state"])),
    ] {
        assert_eq!((&schema(name)["properties"]["state"]["enum"], &schema(name)["required"]), (&json!([state]), &required));
    }
    let completed = schema("Completed");
    assert_eq!(completed["discriminator"]["propertyName"], "state");
    let location = |name: &str| json!(format!("#/components/schemas/{name}"));
    let mapping =
        json!({"published": location("Published"), "verified": location("Verified"), "completing": location("Completing")});
    assert_eq!(completed["discriminator"]["mapping"], mapping);
}

#[test]
fn the_examples_are_valid() {
    let document = document();
    assert_example_parses::<api::OpenUpload>(&document, "OpenUpload");
    assert_example_parses::<api::Upload>(&document, "Upload");
    assert_example_parses::<api::History>(&document, "History");
    assert_example_parses::<api::SignParts>(&document, "SignParts");
    assert_example_parses::<api::SignedParts>(&document, "SignedParts");
    assert_example_parses::<api::CompleteUpload>(&document, "CompleteUpload");
    for name in ["Published", "Verified", "Completing"] {
        assert_example_parses::<api::Completed>(&document, name);
    }
    assert_example_parses::<Pointer>(&document, "Pointer");
    assert_example_parses::<api::Policy>(&document, "Policy");
    assert_example_parses::<api::Problem>(&document, "Problem");
    assert_example_parses::<api::Resolved>(&document, "Resolved");
    assert_example_parses::<api::Validated>(&document, "Validated");
    assert_example_parses::<api::UploadPage>(&document, "UploadPage");
    assert_example_parses::<api::TopicPage>(&document, "TopicPage");
    assert_example_parses::<api::Stats>(&document, "Stats");
    assert_example_parses::<api::Redrive>(&document, "Redrive");
}

#[test]
fn the_document_names_every_error_code() {
    let document = document();
    let code = &document["components"]["schemas"]["Problem"]["properties"]["code"]["$ref"];
    assert_eq!(code, "#/components/schemas/ErrorCode");
    let documented: Vec<&str> =
        document["components"]["schemas"]["ErrorCode"]["enum"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let all: Vec<&str> = api::ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(documented, all);
    let codes: BTreeSet<&str> = crate::problems::CODES.iter().map(|(_, code)| *code).collect();
    assert_eq!(codes, all.into_iter().collect(), "each code has a status in the error table");
    // A client also understands a broker that is newer than itself.
    let newer = json!({"type": "/problems/of-tomorrow", "title": "t", "status": 422, "detail": "d", "code": "of-tomorrow",
        "request_id": "r", "retryable": false});
    let problem: api::Problem = serde_json::from_value(newer).unwrap();
    assert_eq!((problem.code.as_str(), problem.known_code()), ("of-tomorrow", None));
}

/// Whether a schema has an example, or each of its variants has one.
fn has_example(document: &Value, schema: &Value) -> bool {
    let schema = schema["$ref"].as_str().map_or(schema, |location| document.pointer(&location[1..]).unwrap());
    let kinds = schema["oneOf"].as_array().is_some_and(|kinds| kinds.iter().all(|kind| has_example(document, kind)));
    kinds || schema.get("example").is_some()
}

#[test]
fn every_body_has_an_example() {
    let document = document();
    let mut checked = 0;
    for (location, kind, body) in bodies(&document).iter().filter(|(_, kind, _)| kind.contains("json")) {
        checked += 1;
        assert!(body.get("example").is_some() || has_example(&document, &body["schema"]), "{location}: {kind}");
    }
    assert!(checked > 50, "{checked} bodies were checked");
}

/// Asserts that a response has only documented members and every required one.
fn assert_matches_schema(document: &Value, name: &str, response: &Value) {
    let schema = &document["components"]["schemas"][name];
    let all: Vec<&Value> = match schema["allOf"].as_array() {
        Some(parts) => parts
            .iter()
            .map(|part| part["$ref"].as_str().map_or(part, |location| document.pointer(&location[1..]).unwrap()))
            .collect(),
        None => vec![schema],
    };
    let members = response.as_object().unwrap_or_else(|| panic!("{name}: {response}"));
    for member in members.keys() {
        assert!(all.iter().any(|part| part["properties"].get(member).is_some()), "{name} does not document {member}");
    }
    for required in all.iter().filter_map(|part| part["required"].as_array()).flatten() {
        assert!(members.contains_key(required.as_str().unwrap()), "{name} requires {required}: {response}");
    }
}

#[tokio::test]
async fn responses_have_the_documented_members() {
    let broker = TestBroker::start().await;
    let document = document();
    let opened = broker.open(b"hello", json!({"key": "k"})).await.expect(201);
    assert_matches_schema(&document, "Upload", &opened.json);
    assert_matches_schema(&document, "SignedRequest", &opened.json["upload"]);
    let multipart = broker.open(&vec![0; 6 << 20], json!({"part_size": 5 << 20})).await.expect(201);
    assert_matches_schema(&document, "Upload", &multipart.json);
    assert_matches_schema(&document, "SignedPart", &multipart.json["parts"][0]);
    assert_matches_schema(&document, "Upload", &broker.upload(&multipart.id()).await.json);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let done = broker.complete(&opened.id()).await.expect(200).json;
    assert_matches_schema(&document, "Published", &done);
    assert_matches_schema(&document, "Pointer", &done["pointer"]);
    assert_matches_schema(&document, "KafkaRecord", &done["record"]);
    assert_matches_schema(&document, "Upload", &broker.upload(&opened.id()).await.json);
    assert_matches_schema(&document, "UploadPage", &broker.get("/lfs/uploads").await.json);
    let history = broker.get(&format!("/lfs/uploads/{}/history", opened.id())).await.json;
    assert_matches_schema(&document, "History", &history);
    assert_matches_schema(&document, "Transition", &history["items"][0]);
    assert_matches_schema(
        &document,
        "Resolved",
        &broker.send_json("POST", "/lfs/resolve", record(&broker).await).await.expect(200).json,
    );
    assert_matches_schema(
        &document,
        "Validated",
        &broker.send_json("POST", "/lfs/resolve?validate=true", record(&broker).await).await.expect(200).json,
    );
    assert_matches_schema(&document, "Policy", &broker.put_policy(&broker.topic, &json!({})).await.expect(200).json);
    assert_matches_schema(&document, "TopicPage", &broker.get("/lfs/topics").await.expect(200).json);
    assert_matches_schema(&document, "Problem", &broker.get("/lfs/uploads?limit=0").await.expect(422).json);
    assert_matches_schema(&document, "Problem", &broker.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(409).json);
}

async fn record(broker: &TestBroker) -> Vec<u8> {
    broker.records(&broker.topic).await[0].value.clone()
}

/// What a page loads: the values of `src`, `href` and `url(…)`.
fn loads(html: &str) -> Vec<&str> {
    ["src=\"", "href=\"", "src='", "href='", "url("]
        .iter()
        .flat_map(|open| html.split(open).skip(1).filter_map(|rest| rest.split(['"', '\'', ')']).next()))
        .collect()
}

#[tokio::test]
async fn the_docs_load_nothing_from_outside() {
    assert_eq!(loads("<a href=\"https://cdn/x.js\">"), ["https://cdn/x.js"]);
    let broker = TestBroker::start().await;
    let page = broker.get("/docs/").await.expect(200);
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    let loaded = loads(&page.text);
    assert!(loaded.len() >= 3, "{}", page.text);
    for location in loaded {
        assert!(!location.contains("//") && !location.starts_with("data:text"), "{location} is loaded from outside");
        let path = Path::new("/docs").join(location.trim_start_matches("./"));
        broker.get(path.to_str().unwrap()).await.expect(200);
    }
    let start = broker.get("/docs/swagger-initializer.js").await.expect(200);
    assert!(start.text.contains("/openapi.json"));
    assert!(!start.text.contains("http://") && !start.text.contains("https://"), "{}", start.text);
    // Both paths, with and without the slash, serve the page without a redirect.
    let direct = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let page = broker.send(direct.get(format!("{}/docs", broker.url()))).await.expect(200);
    let loaded = loads(&page.text);
    assert!(loaded.len() >= 3, "{}", page.text);
    for location in loaded {
        broker.get(Path::new("/").join(location).to_str().unwrap()).await.expect(200);
    }
}

#[test]
fn the_operations_guide_has_every_member_of_a_policy_with_its_default() {
    let guide = std::fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let document = document();
    let members = document["components"]["schemas"]["Policy"]["properties"].as_object().unwrap();
    assert!(members.len() > 10, "{members:?}");
    for (name, schema) in members {
        let row = format!("| `{name}` | `{}` | ", schema["default"]);
        assert!(guide.contains(&row), "docs/operations.md has no row {row}");
    }
}
