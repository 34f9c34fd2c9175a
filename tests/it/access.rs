//! Authorization: every route, for every scope, in the caller's own tenant and in another tenant.

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{ApiResponse, TestBroker};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// What a route requires from its caller.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Needs {
    Nothing,
    Token,
    Write,
    WriteOrRead,
    Read,
    Admin,
}

impl Needs {
    fn has(self, scope: &str) -> bool {
        let (write, read, admin) = (scope.contains("lfs:write"), scope.contains("lfs:read"), scope.contains("lfs:admin"));
        match self {
            Self::Nothing | Self::Token => true,
            Self::Write => write,
            Self::WriteOrRead => write || read,
            Self::Read => read,
            Self::Admin => admin,
        }
    }
}

/// A route with a valid request. `{id}` is an upload of the tenant acme.
struct Route {
    needs: Needs,
    method: &'static str,
    path: &'static str,
    body: Option<Value>,
    /// The status for an authorized caller; on routes of one upload, for a caller of its tenant.
    expected_status: u16,
}

/// Every route of the API. The first routes do not change the upload, because later routes use it too.
fn routes(topic: &str, pointer: &Value) -> Vec<Route> {
    use Needs::{Admin, Nothing, Read, Token, Write, WriteOrRead};
    let route = |needs, method, path, body, expected_status| Route { needs, method, path, body, expected_status };
    vec![
        route(Write, "POST", "/lfs/uploads", Some(json!({"topic": topic, "size": 5})), 201),
        route(WriteOrRead, "GET", "/lfs/uploads/{id}", None, 200),
        route(WriteOrRead, "GET", "/lfs/uploads", None, 200),
        route(WriteOrRead, "GET", "/lfs/uploads/{id}/history", None, 200),
        route(Write, "POST", "/lfs/uploads/{id}/parts", Some(json!({"part_numbers": [1]})), 409),
        route(Write, "POST", "/lfs/uploads/{id}/complete", Some(json!({})), 200),
        route(Write, "DELETE", "/lfs/uploads/{id}", None, 409),
        route(Admin, "POST", "/lfs/uploads/{id}/redrive", Some(json!({})), 200),
        route(Admin, "POST", "/lfs/uploads/{id}/reverify", None, 200),
        route(Admin, "POST", "/lfs/uploads/{id}/discard", None, 409),
        route(Read, "POST", "/lfs/resolve", Some(pointer.clone()), 200),
        route(Token, "GET", "/lfs/topics", None, 200),
        route(Admin, "PUT", "/lfs/topics/videos", Some(json!({})), 200),
        route(Token, "GET", "/lfs/topics/videos", None, 200),
        route(Admin, "DELETE", "/lfs/topics/unknown", None, 204),
        route(Admin, "GET", "/lfs/stats", None, 200),
        route(Nothing, "GET", "/healthz", None, 200),
        route(Nothing, "GET", "/readyz", None, 200),
        route(Nothing, "GET", "/openapi.json", None, 200),
        route(Nothing, "GET", "/problems/not-found", None, 200),
    ]
}

async fn call(broker: &TestBroker, route: &Route, id: &str, token: Option<&str>) -> ApiResponse {
    let mut request = broker.request(route.method, &route.path.replace("{id}", id));
    if let Some(body) = &route.body {
        request = request.header("content-type", "application/json").body(text(body));
    }
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    broker.send(request).await
}

/// The JSON as clients send it: the broker recognizes a pointer by its first member.
fn text(body: &Value) -> String {
    let mut rest = body.clone();
    match rest.as_object_mut().and_then(|members| members.remove("kfs_lfs")) {
        Some(version) => rest.to_string().replacen('{', &format!("{{\"kfs_lfs\":{version},"), 1),
        None => body.to_string(),
    }
}

/// Publishes an upload of acme and returns its id and its pointer.
async fn published(broker: &TestBroker) -> (String, Value) {
    let acme = token("acme", "lfs:write", &["*"]);
    let body = json!({"topic": broker.topic, "size": 5, "sha256": crate::harness::sha256(b"hello")});
    let opened = broker.send(broker.request("POST", "/lfs/uploads").bearer_auth(&acme).json(&body)).await.expect(201);
    broker.put(&opened.json["upload"], b"hello").await.expect(200);
    let complete = broker.request("POST", &format!("/lfs/uploads/{}/complete", opened.id())).bearer_auth(&acme);
    let done = broker.send(complete).await.expect(200);
    (opened.id(), done.json["pointer"].clone())
}

#[tokio::test]
async fn every_route_accepts_authorized_callers_and_no_others() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let (id, pointer) = published(&broker).await;
    let scopes = ["", "lfs:write", "lfs:read", "lfs:admin", "lfs:write lfs:read", "lfs:write lfs:read lfs:admin", "lfs:other"];
    let mut calls = 0;
    for route in routes(&broker.topic, &pointer) {
        let name = format!("{} {}", route.method, route.path);
        if route.needs != Needs::Nothing {
            call(&broker, &route, &id, None).await.expect_problem(401, "unauthenticated");
            call(&broker, &route, &id, Some("no.token.atall")).await.expect_problem(401, "invalid-token");
        }
        for scope in scopes {
            for tenant in ["acme", "globex"] {
                let response = call(&broker, &route, &id, Some(&token(tenant, scope, &["*"]))).await;
                let found = (response.status, response.code());
                calls += 1;
                let of_acme = route.path.contains("{id}") || route.path == "/lfs/resolve";
                // `lfs:admin` is valid in every tenant.
                let foreign = tenant == "globex" && of_acme && !scope.contains("lfs:admin");
                match (route.needs.has(scope), foreign) {
                    (false, _) => assert_eq!(found, (403, "insufficient-scope"), "{name} for {scope:?}"),
                    (true, true) if route.path == "/lfs/resolve" => assert_eq!(found, (403, "pointer-forbidden"), "{name}"),
                    (true, true) => assert_eq!(found, (404, "upload-not-found"), "{name} for {scope:?} of {tenant}"),
                    (true, false) => {
                        assert_eq!(found.0, route.expected_status, "{name} for {scope:?} of {tenant}: {}", response.text)
                    }
                }
            }
        }
    }
    assert_eq!(calls, 20 * 7 * 2);
}

#[tokio::test]
async fn the_upload_of_another_tenant_gets_the_same_response_as_an_unknown_upload() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let (id, pointer) = published(&broker).await;
    let stranger = token("globex", "lfs:write lfs:read", &["*"]);
    let without_topic = token("acme", "lfs:write lfs:read", &["other"]);
    for route in routes(&broker.topic, &pointer).into_iter().filter(|route| route.path.contains("{id}")) {
        if route.needs == Needs::Admin {
            continue;
        }
        let same = |response: ApiResponse, id: &str| {
            let mut json = response.expect_problem(404, "upload-not-found").json;
            json.as_object_mut().unwrap().remove("request_id");
            json.to_string().replace(id, "ID")
        };
        let unknown = same(call(&broker, &route, UNKNOWN, Some(&stranger)).await, UNKNOWN);
        assert_eq!(same(call(&broker, &route, &id, Some(&stranger)).await, &id), unknown, "{} {}", route.method, route.path);
        assert_eq!(same(call(&broker, &route, &id, Some(&without_topic)).await, &id), unknown, "{} {}", route.method, route.path);
    }
}

#[tokio::test]
async fn a_list_shows_only_the_callers_tenant_and_topics() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let (id, _) = published(&broker).await;
    let list = async |token: String, query: &str| {
        let response = broker.send(broker.request("GET", &format!("/lfs/uploads{query}")).bearer_auth(token)).await.expect(200);
        response.json["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (own, none) = (vec![id.clone()], Vec::<String>::new());
    assert_eq!(list(token("acme", "lfs:read", &["*"]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &[&broker.topic]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &["it-*"]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &["other", "x*"]), "").await, none);
    // Only a trailing star is a wildcard, in a list as elsewhere.
    assert_eq!(list(token("acme", "lfs:read", &["it-**"]), "").await, none);
    assert_eq!(list(token("acme", "lfs:read", &[]), "").await, none);
    assert_eq!(list(token("globex", "lfs:read", &["*"]), "").await, none);
    assert_eq!(list(token("globex", "lfs:read", &["*"]), &format!("?topic={}", broker.topic)).await, none);
    assert_eq!(list(token("globex", "lfs:read lfs:admin", &["*"]), "?tenant=acme").await, [id]);
    // Only an administrator may list another tenant.
    let calls = broker.request("GET", "/lfs/uploads?tenant=acme").bearer_auth(token("globex", "lfs:read", &["*"]));
    assert!([403, 422].contains(&broker.send(calls).await.status));
}

#[tokio::test]
async fn a_pointer_resolves_only_in_its_own_tenant_and_topic() {
    let broker = TestBroker::start_with_tokens(|_| {}).await;
    let (_, pointer) = published(&broker).await;
    let resolve = async |token: String, pointer: &Value| {
        broker
            .send(
                broker
                    .request("POST", "/lfs/resolve")
                    .bearer_auth(token)
                    .header("content-type", "application/json")
                    .body(text(pointer)),
            )
            .await
    };
    resolve(token("acme", "lfs:read", &[&broker.topic]), &pointer).await.expect(200);
    resolve(token("acme", "lfs:read", &["other"]), &pointer).await.expect_problem(403, "pointer-forbidden");
    resolve(token("acme", "lfs:read", &[]), &pointer).await.expect_problem(403, "pointer-forbidden");
    // However the key is spelled, it belongs to acme.
    let key = pointer["key"].as_str().unwrap();
    for spelled in [
        key.to_owned(),
        format!("globex/../{key}"),
        format!("./{key}"),
        format!("/{key}"),
        format!("globex//{key}"),
        format!("globex/{}/lfs/../../../{key}", broker.topic),
        key.replacen('/', "%2F", 1),
        key.replacen("acme", "ACME", 1),
        format!("{key}\u{0}"),
    ] {
        let mut forged = pointer.clone();
        forged["key"] = spelled.clone().into();
        let response = resolve(token("globex", "lfs:read", &["*"]), &forged).await;
        assert!([403, 410, 422].contains(&response.status) && response.json["url"].is_null(), "{spelled}: {}", response.text);
    }
    let mut other_bucket = pointer;
    other_bucket["bucket"] = "another-bucket".into();
    resolve(token("acme", "lfs:read", &["*"]), &other_bucket).await.expect_problem(403, "pointer-forbidden");
}
