//! Who may do what: every route, for every role, in one's own tenant and in another's.

use serde_json::{Value, json};

use crate::harness::tokens::token;
use crate::harness::{Answer, House};

const UNKNOWN: &str = "01920000-0000-7000-8000-000000000000";

/// What a route asks of whoever calls it.
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

/// A route with a request that is in order; `{id}` is an upload of the tenant acme.
struct Route {
    needs: Needs,
    method: &'static str,
    path: &'static str,
    body: Option<Value>,
    /// The status for whoever may; with tenants apart, for the upload's own.
    fine: u16,
}

/// Every route of the contract. The first of them leave the upload as it is, for whoever comes next.
fn routes(topic: &str, pointer: &Value) -> Vec<Route> {
    use Needs::{Admin, Nothing, Read, Token, Write, WriteOrRead};
    let route = |needs, method, path, body, fine| Route { needs, method, path, body, fine };
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

async fn ask(house: &House, route: &Route, id: &str, token: Option<&str>) -> Answer {
    let mut request = house.request(route.method, &route.path.replace("{id}", id));
    if let Some(body) = &route.body {
        request = request.header("content-type", "application/json").body(text(body));
    }
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    house.send(request).await
}

/// JSON as it is sent: a pointer is known by its first member.
fn text(body: &Value) -> String {
    let mut rest = body.clone();
    match rest.as_object_mut().and_then(|members| members.remove("kfs_lfs")) {
        Some(version) => rest.to_string().replacen('{', &format!("{{\"kfs_lfs\":{version},"), 1),
        None => body.to_string(),
    }
}

/// An upload of acme that is published: its id and its pointer.
async fn published(house: &House) -> (String, Value) {
    let acme = token("acme", "lfs:write", &["*"]);
    let body = json!({"topic": house.topic, "size": 5, "sha256": crate::harness::sha256(b"hello")});
    let opened = house.send(house.request("POST", "/lfs/uploads").bearer_auth(&acme).json(&body)).await.expect(201);
    house.put(&opened.json["upload"], b"hello").await.expect(200);
    let complete = house.request("POST", &format!("/lfs/uploads/{}/complete", opened.id())).bearer_auth(&acme);
    let done = house.send(complete).await.expect(200);
    (opened.id(), done.json["pointer"].clone())
}

#[tokio::test]
async fn every_route_lets_in_those_who_may_and_nobody_else() {
    let house = House::with_tokens(|_| {}).await;
    let (id, pointer) = published(&house).await;
    let scopes = ["", "lfs:write", "lfs:read", "lfs:admin", "lfs:write lfs:read", "lfs:write lfs:read lfs:admin", "lfs:other"];
    let mut asked = 0;
    for route in routes(&house.topic, &pointer) {
        let what = format!("{} {}", route.method, route.path);
        if route.needs != Needs::Nothing {
            ask(&house, &route, &id, None).await.expect_problem(401, "unauthenticated");
            ask(&house, &route, &id, Some("no.token.atall")).await.expect_problem(401, "invalid-token");
        }
        for scope in scopes {
            for tenant in ["acme", "globex"] {
                let answer = ask(&house, &route, &id, Some(&token(tenant, scope, &["*"]))).await;
                let told = (answer.status, answer.code());
                asked += 1;
                let of_acme = route.path.contains("{id}") || route.path == "/lfs/resolve";
                // An administrator is broker-wide.
                let foreign = tenant == "globex" && of_acme && !scope.contains("lfs:admin");
                match (route.needs.has(scope), foreign) {
                    (false, _) => assert_eq!(told, (403, "insufficient-scope"), "{what} for {scope:?}"),
                    (true, true) if route.path == "/lfs/resolve" => assert_eq!(told, (403, "pointer-forbidden"), "{what}"),
                    (true, true) => assert_eq!(told, (404, "upload-not-found"), "{what} for {scope:?} of {tenant}"),
                    (true, false) => assert_eq!(told.0, route.fine, "{what} for {scope:?} of {tenant}: {}", answer.text),
                }
            }
        }
    }
    assert_eq!(asked, 20 * 7 * 2);
}

#[tokio::test]
async fn a_foreign_upload_and_an_unknown_one_are_the_same() {
    let house = House::with_tokens(|_| {}).await;
    let (id, pointer) = published(&house).await;
    let stranger = token("globex", "lfs:write lfs:read", &["*"]);
    let without_topic = token("acme", "lfs:write lfs:read", &["other"]);
    for route in routes(&house.topic, &pointer).into_iter().filter(|route| route.path.contains("{id}")) {
        if route.needs == Needs::Admin {
            continue;
        }
        let same = |answer: Answer, id: &str| {
            let mut json = answer.expect_problem(404, "upload-not-found").json;
            json.as_object_mut().unwrap().remove("request_id");
            json.to_string().replace(id, "ID")
        };
        let unknown = same(ask(&house, &route, UNKNOWN, Some(&stranger)).await, UNKNOWN);
        assert_eq!(same(ask(&house, &route, &id, Some(&stranger)).await, &id), unknown, "{} {}", route.method, route.path);
        assert_eq!(same(ask(&house, &route, &id, Some(&without_topic)).await, &id), unknown, "{} {}", route.method, route.path);
    }
}

#[tokio::test]
async fn a_list_shows_the_callers_tenant_and_topics_only() {
    let house = House::with_tokens(|_| {}).await;
    let (id, _) = published(&house).await;
    let list = async |token: String, query: &str| {
        let answer = house.send(house.request("GET", &format!("/lfs/uploads{query}")).bearer_auth(token)).await.expect(200);
        answer.json["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let (own, nobody) = (vec![id.clone()], Vec::<String>::new());
    assert_eq!(list(token("acme", "lfs:read", &["*"]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &[&house.topic]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &["it-*"]), "").await, own);
    assert_eq!(list(token("acme", "lfs:read", &["other", "x*"]), "").await, nobody);
    // Only the last star stands for anything, in a list as elsewhere.
    assert_eq!(list(token("acme", "lfs:read", &["it-**"]), "").await, nobody);
    assert_eq!(list(token("acme", "lfs:read", &[]), "").await, nobody);
    assert_eq!(list(token("globex", "lfs:read", &["*"]), "").await, nobody);
    assert_eq!(list(token("globex", "lfs:read", &["*"]), &format!("?topic={}", house.topic)).await, nobody);
    assert_eq!(list(token("globex", "lfs:read lfs:admin", &["*"]), "?tenant=acme").await, [id]);
    // Asking for another tenant is an administrator's.
    let asked = house.request("GET", "/lfs/uploads?tenant=acme").bearer_auth(token("globex", "lfs:read", &["*"]));
    assert!([403, 422].contains(&house.send(asked).await.status));
}

#[tokio::test]
async fn a_pointer_resolves_in_its_own_tenant_and_topic_only() {
    let house = House::with_tokens(|_| {}).await;
    let (_, pointer) = published(&house).await;
    let resolve = async |token: String, pointer: &Value| {
        house
            .send(
                house
                    .request("POST", "/lfs/resolve")
                    .bearer_auth(token)
                    .header("content-type", "application/json")
                    .body(text(pointer)),
            )
            .await
    };
    resolve(token("acme", "lfs:read", &[&house.topic]), &pointer).await.expect(200);
    resolve(token("acme", "lfs:read", &["other"]), &pointer).await.expect_problem(403, "pointer-forbidden");
    resolve(token("acme", "lfs:read", &[]), &pointer).await.expect_problem(403, "pointer-forbidden");
    // Whatever the key is spelt like, it is acme's.
    let key = pointer["key"].as_str().unwrap();
    for spelt in [
        key.to_owned(),
        format!("globex/../{key}"),
        format!("./{key}"),
        format!("/{key}"),
        format!("globex//{key}"),
        format!("globex/{}/lfs/../../../{key}", house.topic),
        key.replacen('/', "%2F", 1),
        key.replacen("acme", "ACME", 1),
        format!("{key}\u{0}"),
    ] {
        let mut forged = pointer.clone();
        forged["key"] = spelt.clone().into();
        let answer = resolve(token("globex", "lfs:read", &["*"]), &forged).await;
        assert!([403, 410, 422].contains(&answer.status) && answer.json["url"].is_null(), "{spelt}: {}", answer.text);
    }
    let mut elsewhere = pointer;
    elsewhere["bucket"] = "another-bucket".into();
    resolve(token("acme", "lfs:read", &["*"]), &elsewhere).await.expect_problem(403, "pointer-forbidden");
}
