//! Swagger UI for the API. The program serves all files of the page; the page loads nothing from other hosts.

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

/// The routes for `/docs` and the files that its page loads.
///
/// `base_path` is the path of the API as browsers see it.
pub(super) fn routes<S: Clone + Send + Sync + 'static>(base_path: &str) -> Router<S> {
    let config = Arc::new(Config::from(format!("{base_path}/openapi.json")).validator_url("none"));
    let file = move |name: &str, change: fn(String) -> String| file(name, Arc::clone(&config), change);
    let (page, directory) = (file.clone(), file.clone());
    Router::new()
        // The page uses relative links. Under `/docs`, without the slash, they need the prefix `docs/`.
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
            tracing::error!(%error, name, "cannot render the Swagger UI file {name}: {error}");
            Problem::new(ErrorCode::Internal, "the page cannot be rendered").into_response()
        }
    }
}
