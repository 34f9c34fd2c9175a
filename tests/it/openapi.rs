//! The contract as a document: committed, served, complete and true.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lfs_broker_client::api;
use lfs_broker_client::pointer::Pointer;
use serde_json::{Value, json};

use crate::harness::House;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn document() -> Value {
    serde_json::to_value(lfs_broker::http::openapi()).unwrap()
}

/// Every operation: method, path, operation.
fn operations(document: &Value) -> Vec<(String, String, Value)> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            operations.push((method.to_uppercase(), path.clone(), operation.clone()));
        }
    }
    operations
}

/// The bodies of all requests and answers: whose, of which media type, and what is said of them.
fn bodies(document: &Value) -> Vec<(String, String, Value)> {
    let mut bodies = Vec::new();
    for (method, path, operation) in operations(document) {
        let answers = operation["responses"].as_object().unwrap().values();
        for content in answers.chain([&operation["requestBody"]]).filter_map(|body| body["content"].as_object()) {
            bodies.extend(content.iter().map(|(kind, body)| (format!("{method} {path}"), kind.clone(), body.clone())));
        }
    }
    bodies
}

#[test]
fn the_committed_document_is_that_of_the_handlers() {
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
    let house = House::new().await;
    let served = house.get("/openapi.json").await.expect(200);
    assert_eq!(served.headers["content-type"], "application/json");
    assert_eq!(served.json, document());
    assert!(served.json["openapi"].as_str().unwrap().starts_with("3.1"));
}

/// The text between `open` and the next `"` after each place where it stands.
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
    // The pages that show the document are for people.
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
    let house = House::new().await;
    for (method, path, _) in operations(&document()) {
        let path = path.replace("{id}", "x").replace("{topic}", "x").replace("{code}", "internal");
        let answer = house.send(house.request(&method, &path)).await;
        assert!(!["not-found", "method-not-allowed"].contains(&answer.code()), "{method} {path}: {}", answer.text);
    }
}

#[test]
fn every_operation_has_its_own_id_and_says_what_it_does() {
    let document = document();
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
        assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{id}");
        for member in ["summary", "description"] {
            assert!(operation[member].as_str().is_some_and(|text| text.len() > 5), "{id} has no {member}");
        }
        assert_eq!(operation["tags"].as_array().unwrap().len(), 1, "{id}");
    }
}

#[test]
fn every_operation_behind_a_token_documents_what_can_go_wrong() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let answers = operation["responses"].as_object().unwrap();
        assert!(answers.keys().any(|status| status.starts_with('2')), "{method} {path}");
        if !path.starts_with("/lfs/") {
            assert_eq!(operation["security"], json!([{}]), "{method} {path} needs no token");
            continue;
        }
        assert!(operation["security"].is_null(), "{method} {path} needs what the document says");
        for status in ["4XX", "503"] {
            let problem = &answers[status]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path} {status}");
        }
    }
    assert_eq!(document["security"], json!([{"bearer": []}]));
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
}

#[test]
fn no_query_is_required_and_limits_are_told() {
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

/// Reads an example as the type that it is an example of.
fn reads<T: serde::de::DeserializeOwned>(document: &Value, name: &str) {
    let example = &document["components"]["schemas"][name]["example"];
    assert!(example.is_object(), "{name} has no example");
    if let Err(error) = serde_json::from_value::<T>(example.clone()) {
        panic!("{name}'s example is none: {error}");
    }
}

/// What a generator would have to call `any`, with its place; and what is both optional and null.
fn vague(schema: &Value, place: &str, found: &mut Vec<String>) {
    let Some(members) = schema.as_object() else { return };
    if !["type", "$ref", "oneOf", "allOf", "enum"].iter().any(|key| members.contains_key(*key)) {
        found.push(format!("{place} has no type"));
    }
    let open = members.get("type") == Some(&json!("object"));
    if open && !["properties", "additionalProperties"].iter().any(|key| members.contains_key(*key)) {
        found.push(format!("{place} is any object"));
    }
    for (name, member) in schema["properties"].as_object().into_iter().flatten() {
        let required = schema["required"].as_array().is_some_and(|names| names.contains(&json!(name)));
        let null = member["type"].as_array().is_some_and(|types| types.contains(&json!("null")))
            || member["oneOf"].as_array().is_some_and(|each| each.contains(&json!({"type": "null"})));
        let request = schema["additionalProperties"] == false;
        if null && !request && !required && member.get("default").is_none() {
            found.push(format!("{place}/{name} is absent or null"));
        }
        vague(member, &format!("{place}/{name}"), found);
    }
    for part in schema["oneOf"].as_array().into_iter().flatten() {
        if part.get("$ref").is_some() && part.as_object().is_some_and(|members| members.len() > 1) {
            found.push(format!("{place} has a reference that is more"));
        }
    }
    for (number, part) in ["oneOf", "allOf"].iter().filter_map(|key| schema[key].as_array()).flatten().enumerate() {
        vague(part, &format!("{place}/{number}"), found);
    }
    for key in ["items", "additionalProperties"] {
        vague(&schema[key], &format!("{place}/{key}"), found);
    }
}

#[test]
fn no_type_is_left_to_guess() {
    let document = document();
    let mut found = Vec::new();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        vague(schema, name, &mut found);
    }
    for (place, _, body) in bodies(&document) {
        assert!(!body["schema"]["oneOf"].is_array(), "{place}: a schema without a name");
        vague(&body["schema"], &place, &mut found);
    }
    assert!(found.is_empty(), "{found:#?}");
    let mut all = Vec::new();
    vague(
        &json!({"type": "object", "properties": {"a": {}, "b": {"type": ["string", "null"]}, "c": {"type": "object"}}}),
        "x",
        &mut all,
    );
    assert_eq!(all, ["x/a has no type", "x/b is absent or null", "x/c is any object"]);
}

#[test]
fn the_answers_of_complete_tell_themselves_apart() {
    let document = document();
    let schema = |name: &str| document["components"]["schemas"][name].clone();
    let answers = &document["paths"]["/lfs/uploads/{id}/complete"]["post"]["responses"];
    for status in ["200", "202"] {
        let body = &answers[status]["content"]["application/json"]["schema"]["$ref"];
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
    let place = |name: &str| json!(format!("#/components/schemas/{name}"));
    let mapping = json!({"published": place("Published"), "verified": place("Verified"), "completing": place("Completing")});
    assert_eq!(completed["discriminator"]["mapping"], mapping);
}

#[test]
fn the_examples_are_true() {
    let document = document();
    reads::<api::OpenUpload>(&document, "OpenUpload");
    reads::<api::Upload>(&document, "Upload");
    reads::<api::History>(&document, "History");
    reads::<api::SignParts>(&document, "SignParts");
    reads::<api::SignedParts>(&document, "SignedParts");
    reads::<api::CompleteUpload>(&document, "CompleteUpload");
    for name in ["Published", "Verified", "Completing"] {
        reads::<api::Completed>(&document, name);
    }
    reads::<Pointer>(&document, "Pointer");
    reads::<api::Policy>(&document, "Policy");
    reads::<api::Problem>(&document, "Problem");
    reads::<api::Resolved>(&document, "Resolved");
    reads::<api::Validated>(&document, "Validated");
    reads::<api::UploadPage>(&document, "UploadPage");
    reads::<api::TopicPage>(&document, "TopicPage");
    reads::<api::Stats>(&document, "Stats");
    reads::<api::Redrive>(&document, "Redrive");
}

#[test]
fn the_document_names_every_code_of_a_problem() {
    let document = document();
    let code = &document["components"]["schemas"]["Problem"]["properties"]["code"]["$ref"];
    assert_eq!(code, "#/components/schemas/ErrorCode");
    let told: Vec<&str> =
        document["components"]["schemas"]["ErrorCode"]["enum"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let all: Vec<&str> = api::ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(told, all);
    let codes: BTreeSet<&str> = crate::problems::CODES.iter().map(|(_, code)| *code).collect();
    assert_eq!(codes, all.into_iter().collect(), "each has a status in the error table");
    // A broker that is newer than its client is still understood.
    let tomorrow = json!({"type": "/problems/of-tomorrow", "title": "t", "status": 422, "detail": "d", "code": "of-tomorrow",
        "request_id": "r", "retryable": false});
    let problem: api::Problem = serde_json::from_value(tomorrow).unwrap();
    assert_eq!((problem.code.as_str(), problem.known_code()), ("of-tomorrow", None));
}

/// Whether the schema of a body shows how it looks: by itself, or by each of its kinds.
fn shows(document: &Value, schema: &Value) -> bool {
    let schema = schema["$ref"].as_str().map_or(schema, |place| document.pointer(&place[1..]).unwrap());
    let kinds = schema["oneOf"].as_array().is_some_and(|kinds| kinds.iter().all(|kind| shows(document, kind)));
    kinds || schema.get("example").is_some()
}

#[test]
fn every_body_has_an_example() {
    let document = document();
    let mut seen = 0;
    for (place, kind, body) in bodies(&document).iter().filter(|(_, kind, _)| kind.contains("json")) {
        seen += 1;
        assert!(body.get("example").is_some() || shows(&document, &body["schema"]), "{place}: {kind}");
    }
    assert!(seen > 50, "{seen} bodies were looked at");
}

/// Holds an answer against a schema: no member that it lacks, none missing that it requires.
fn fits(document: &Value, name: &str, answer: &Value) {
    let schema = &document["components"]["schemas"][name];
    let all: Vec<&Value> = match schema["allOf"].as_array() {
        Some(parts) => {
            parts.iter().map(|part| part["$ref"].as_str().map_or(part, |place| document.pointer(&place[1..]).unwrap())).collect()
        }
        None => vec![schema],
    };
    let members = answer.as_object().unwrap_or_else(|| panic!("{name}: {answer}"));
    for member in members.keys() {
        assert!(all.iter().any(|part| part["properties"].get(member).is_some()), "{name} does not document {member}");
    }
    for required in all.iter().filter_map(|part| part["required"].as_array()).flatten() {
        assert!(members.contains_key(required.as_str().unwrap()), "{name} requires {required}: {answer}");
    }
}

#[tokio::test]
async fn answers_have_the_members_that_the_document_tells() {
    let house = House::new().await;
    let document = document();
    let opened = house.open(b"hello", json!({"key": "k"})).await.expect(201);
    fits(&document, "Upload", &opened.json);
    fits(&document, "SignedRequest", &opened.json["upload"]);
    let multipart = house.open(&vec![0; 6 << 20], json!({"part_size": 5 << 20})).await.expect(201);
    fits(&document, "Upload", &multipart.json);
    fits(&document, "SignedPart", &multipart.json["parts"][0]);
    fits(&document, "Upload", &house.upload(&multipart.id()).await.json);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let done = house.complete(&opened.id()).await.expect(200).json;
    fits(&document, "Published", &done);
    fits(&document, "Pointer", &done["pointer"]);
    fits(&document, "KafkaRecord", &done["record"]);
    fits(&document, "Upload", &house.upload(&opened.id()).await.json);
    fits(&document, "UploadPage", &house.get("/lfs/uploads").await.json);
    let history = house.get(&format!("/lfs/uploads/{}/history", opened.id())).await.json;
    fits(&document, "History", &history);
    fits(&document, "Transition", &history["items"][0]);
    fits(&document, "Resolved", &house.send_json("POST", "/lfs/resolve", record(&house).await).await.expect(200).json);
    fits(
        &document,
        "Validated",
        &house.send_json("POST", "/lfs/resolve?validate=true", record(&house).await).await.expect(200).json,
    );
    fits(&document, "Policy", &house.put_policy(&house.topic, &json!({})).await.expect(200).json);
    fits(&document, "TopicPage", &house.get("/lfs/topics").await.expect(200).json);
    fits(&document, "Problem", &house.get("/lfs/uploads?limit=0").await.expect(422).json);
    fits(&document, "Problem", &house.delete(&format!("/lfs/uploads/{}", opened.id())).await.expect(409).json);
}

async fn record(house: &House) -> Vec<u8> {
    house.records(&house.topic).await[0].value.clone()
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
    let house = House::new().await;
    let page = house.get("/docs/").await.expect(200);
    assert!(page.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    let loaded = loads(&page.text);
    assert!(loaded.len() >= 3, "{}", page.text);
    for place in loaded {
        assert!(!place.contains("//") && !place.starts_with("data:text"), "{place} is loaded from outside");
        let path = Path::new("/docs").join(place.trim_start_matches("./"));
        house.get(path.to_str().unwrap()).await.expect(200);
    }
    let start = house.get("/docs/swagger-initializer.js").await.expect(200);
    assert!(start.text.contains("/openapi.json"));
    assert!(!start.text.contains("http://") && !start.text.contains("https://"), "{}", start.text);
    // With and without the slash it is the page, not the way to it.
    let direct = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
    let page = house.send(direct.get(format!("{}/docs", house.url()))).await.expect(200);
    let loaded = loads(&page.text);
    assert!(loaded.len() >= 3, "{}", page.text);
    for place in loaded {
        house.get(Path::new("/").join(place).to_str().unwrap()).await.expect(200);
    }
}
