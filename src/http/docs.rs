//! The contract to browse: Swagger UI out of this program, which loads nothing from elsewhere.

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use lfs_broker_client::api::ErrorCode;
use utoipa_swagger_ui::{Config, serve};

use super::problem::Problem;

const PAGE: &str = "index.html";

/// `/docs` and what its page loads.
///
/// `base_path` is where the API is for whoever looks from outside.
pub(super) fn routes<S: Clone + Send + Sync + 'static>(base_path: &str) -> Router<S> {
    let config = Arc::new(Config::from(format!("{base_path}/openapi.json")).validator_url("none"));
    let file = move |name: &str, change: fn(String) -> String| file(name, Arc::clone(&config), change);
    let (page, directory) = (file.clone(), file.clone());
    Router::new()
        // The page names its parts relative to a directory, and this address is none.
        .route(
            "/docs",
            get(async move || page(PAGE, |page| page.replace("=\"./", "=\"docs/").replace("=\"index.css", "=\"docs/index.css"))),
        )
        .route("/docs/", get(async move || directory(PAGE, |page| page)))
        .route("/docs/{*name}", get(async move |Path(name): Path<String>| file(&name, |content| content)))
}

fn file(name: &str, config: Arc<Config<'static>>, change: fn(String) -> String) -> Response {
    match serve(name, config) {
        Ok(Some(found)) => {
            let content = match name == PAGE {
                true => change(String::from_utf8_lossy(&found.bytes).into_owned()).into_bytes(),
                false => found.bytes.into_owned(),
            };
            ([(header::CONTENT_TYPE, found.content_type)], content).into_response()
        }
        Ok(None) => Problem::new(ErrorCode::NotFound, "no such page").into_response(),
        Err(error) => {
            tracing::error!(%error, name, "a page of the contract cannot be made");
            Problem::new(ErrorCode::Internal, "the page cannot be made").into_response()
        }
    }
}
