//! Topic policies.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use lfs_broker_client::api::{ListTopics, Policy, TopicPage};
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::extract::{Admin, Authenticated, Body, Query, TopicName};
use super::json::parse;
use super::problem::Problem;

/// The routes of this file.
pub(super) fn routes() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list_topics)).routes(routes!(get_topic, put_topic, delete_topic))
}

/// List topic policies
///
/// The policies that an administrator stored, ordered by topic name.
#[utoipa::path(
    get, path = "/lfs/topics", operation_id = "listTopics", tag = "topics", params(ListTopics),
    responses(
        (status = 200, description = "A page", body = TopicPage),
    )
)]
async fn list_topics(
    State(app): State<App>,
    _: Authenticated,
    Query(query): Query<ListTopics>,
) -> Result<Json<TopicPage>, Problem> {
    Ok(Json(app.broker.topics(&query).await?))
}

/// Read a topic's policy
///
/// 404 if none is stored: then the broker's default policy applies.
#[utoipa::path(
    get, path = "/lfs/topics/{topic}", operation_id = "getTopic", tag = "topics",
    params(("topic" = String, Path, description = "The topic")),
    responses(
        (status = 200, description = "The policy", body = Policy),
    )
)]
async fn get_topic(State(app): State<App>, _: Authenticated, TopicName(topic): TopicName) -> Result<Json<Policy>, Problem> {
    Ok(Json(app.broker.topic(&topic).await?))
}

/// Store a topic's policy
///
/// Replaces the whole policy. An absent member gets its default. The new policy applies at once, on every replica.
#[utoipa::path(
    put, path = "/lfs/topics/{topic}", operation_id = "putTopic", tag = "topics", request_body = Policy,
    params(("topic" = String, Path, description = "The topic")),
    responses(
        (status = 200, description = "The policy as stored", body = Policy),
    )
)]
async fn put_topic(
    State(app): State<App>,
    _: Admin,
    TopicName(topic): TopicName,
    Body(members): Body<Map<String, Value>>,
) -> Result<Json<Policy>, Problem> {
    let mut merged = serde_json::to_value(app.broker.base_policy()).expect("a policy has only strings and numbers");
    if let Value::Object(base) = &mut merged {
        base.extend(members);
    }
    let policy = parse(merged.to_string().as_bytes())?;
    Ok(Json(app.broker.put_topic(&topic, policy).await?))
}

/// Delete a topic's policy
///
/// The response is also 204 if no policy is stored.
#[utoipa::path(
    delete, path = "/lfs/topics/{topic}", operation_id = "deleteTopic", tag = "topics",
    params(("topic" = String, Path, description = "The topic")),
    responses(
        (status = 204, description = "Deleted"),
    )
)]
async fn delete_topic(State(app): State<App>, _: Admin, TopicName(topic): TopicName) -> Result<StatusCode, Problem> {
    app.broker.delete_topic(&topic).await?;
    Ok(StatusCode::NO_CONTENT)
}
