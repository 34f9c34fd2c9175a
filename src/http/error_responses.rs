//! The error responses in the OpenAPI document: which error codes each operation may return.
//!
//! The status and the meaning of a code come from [`code_info`], so they are defined once.

use std::collections::BTreeMap;

use lfs_broker_client::api::ErrorCode;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::schema::Type;
use utoipa::openapi::{ContentBuilder, ObjectBuilder, OpenApi, Ref, RefOr, ResponseBuilder, Schema};

use super::problem::code_info;

/// Codes of every operation. The server refuses such a request before it calls a handler. They share the status `4XX`.
const ANY_REQUEST: &[ErrorCode] = &[
    ErrorCode::MalformedRequest,
    ErrorCode::HostForbidden,
    ErrorCode::NotFound,
    ErrorCode::MethodNotAllowed,
    ErrorCode::RequestTimeout,
    ErrorCode::RequestTooLarge,
    ErrorCode::HeadersTooLarge,
];

/// Codes of every operation except health checks: the broker is overloaded, or has a bug.
const SERVED: &[ErrorCode] = &[ErrorCode::RateLimited, ErrorCode::Internal, ErrorCode::DependencyUnavailable];

/// Codes of every operation that needs a token.
const TOKEN: &[ErrorCode] = &[ErrorCode::Unauthenticated, ErrorCode::InvalidToken, ErrorCode::InsufficientScope];

/// Codes of every operation that reads a body.
const BODY: &[ErrorCode] = &[ErrorCode::MalformedJson, ErrorCode::UnsupportedMediaType, ErrorCode::ValidationFailed];

/// The codes of one operation, in addition to those that many operations share.
const OPERATIONS: &[(&str, &[ErrorCode])] = &[
    (
        "openUpload",
        &[
            ErrorCode::IdempotencyKeyInvalid,
            ErrorCode::TopicForbidden,
            ErrorCode::TopicNotEnabled,
            ErrorCode::TopicNotFound,
            ErrorCode::IdempotencyInFlight,
            // A replay may meet an upload that ends at the same moment.
            ErrorCode::StateConflict,
            ErrorCode::UploadExpired,
            ErrorCode::UploadAborted,
            ErrorCode::CompletionUnknown,
            ErrorCode::ObjectTooLarge,
            ErrorCode::ChecksumNotAllowed,
            ErrorCode::ContentTypeNotAllowed,
            ErrorCode::IdempotencyKeyReused,
            ErrorCode::RecordTooLarge,
            ErrorCode::QuotaBytesExceeded,
            ErrorCode::QuotaSessionsExceeded,
        ],
    ),
    ("listUploads", &[ErrorCode::ValidationFailed]),
    ("getUpload", &[ErrorCode::UploadNotFound, ErrorCode::ValidationFailed]),
    ("getUploadHistory", &[ErrorCode::UploadNotFound, ErrorCode::ValidationFailed]),
    (
        "signParts",
        &[
            ErrorCode::UploadNotFound,
            ErrorCode::StateConflict,
            ErrorCode::UploadExpired,
            ErrorCode::UploadAborted,
            ErrorCode::CompletionUnknown,
        ],
    ),
    (
        "completeUpload",
        &[
            ErrorCode::UploadNotFound,
            ErrorCode::ObjectMissing,
            ErrorCode::PartsIncomplete,
            ErrorCode::StateConflict,
            ErrorCode::UploadExpired,
            ErrorCode::UploadAborted,
            ErrorCode::SizeMismatch,
            ErrorCode::ChecksumMismatch,
            ErrorCode::ObjectForeign,
            ErrorCode::Unpublishable,
            ErrorCode::CompletionUnknown,
        ],
    ),
    ("abortUpload", &[ErrorCode::UploadNotFound, ErrorCode::CompletionInProgress, ErrorCode::StateConflict]),
    (
        "resolvePointer",
        &[
            ErrorCode::PointerForbidden,
            ErrorCode::ObjectGone,
            ErrorCode::PointerInvalid,
            ErrorCode::SizeMismatch,
            ErrorCode::ChecksumMismatch,
        ],
    ),
    ("listTopics", &[ErrorCode::ValidationFailed]),
    ("getTopic", &[ErrorCode::TopicNotFound]),
    ("putTopic", &[ErrorCode::TopicForbidden]),
    ("deleteTopic", &[]),
    ("redriveUpload", &[ErrorCode::UploadNotFound, ErrorCode::StateConflict]),
    (
        "reverifyUpload",
        &[
            ErrorCode::UploadNotFound,
            ErrorCode::StateConflict,
            ErrorCode::ObjectGone,
            ErrorCode::SizeMismatch,
            ErrorCode::ChecksumMismatch,
            ErrorCode::ObjectForeign,
        ],
    ),
    ("discardUpload", &[ErrorCode::UploadNotFound, ErrorCode::StateConflict]),
    ("getStats", &[]),
    ("getHealth", &[]),
    ("getReadiness", &[]),
    ("getContract", &[]),
    ("explainProblem", &[ErrorCode::NotFound]),
];

/// Adds the error responses to every operation, and the meaning of every code to the schema `ErrorCode`.
pub(super) fn add(document: &mut OpenApi) {
    for path in document.paths.paths.values_mut() {
        for operation in operations(path) {
            add_to_operation(operation);
        }
    }
    let schemas = &mut document.components.get_or_insert_default().schemas;
    if let Some(RefOr::T(Schema::Object(schema))) = schemas.get_mut("ErrorCode") {
        schema.description = Some(format!("{}\n\n{}", schema.description.take().unwrap_or_default(), code_table()));
    }
}

/// The operations of a path.
pub(super) fn operations(path: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut path.get, &mut path.put, &mut path.post, &mut path.delete].into_iter().flatten()
}

fn add_to_operation(operation: &mut Operation) {
    let id = operation.operation_id.as_deref().unwrap_or_default();
    let own = OPERATIONS.iter().find(|(name, _)| *name == id).map_or(&[][..], |(_, codes)| codes);
    let is_health_check = ["getHealth", "getReadiness"].contains(&id);
    let needs_token = operation.security.is_none();
    let groups = [(own, true), (SERVED, !is_health_check), (TOKEN, needs_token), (BODY, operation.request_body.is_some())];
    let mut statuses: BTreeMap<String, Vec<ErrorCode>> = BTreeMap::new();
    for code in groups.into_iter().filter(|(_, applies)| *applies).flat_map(|(codes, _)| codes) {
        statuses.entry(code_info(*code).status.to_string()).or_default().push(*code);
    }
    statuses.insert("4XX".to_owned(), ANY_REQUEST.to_vec());
    for (status, codes) in statuses {
        operation.responses.responses.insert(status.clone(), response(&status, &codes).build().into());
    }
}

fn response(status: &str, codes: &[ErrorCode]) -> ResponseBuilder {
    let names: Vec<String> = codes.iter().map(|code| format!("`{code}`")).collect();
    let description = match status {
        "4XX" => format!("Any other refused request: {}", names.join(", ")),
        _ => names.join(", "),
    };
    let problem = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
    let response = ResponseBuilder::new().description(description).content("application/problem+json", problem);
    match status {
        "401" => response.header("WWW-Authenticate", header(Type::String, "The challenge of RFC 6750: `Bearer`.")),
        "429" | "503" => response.header("Retry-After", header(Type::Integer, "Seconds to wait before the retry.")),
        _ => response,
    }
}

fn header(kind: Type, description: &str) -> utoipa::openapi::Header {
    let schema = ObjectBuilder::new().schema_type(kind);
    HeaderBuilder::new().schema(Some(schema)).description(Some(description)).build()
}

/// Every code with its status and its meaning, as a table in Markdown.
fn code_table() -> String {
    let mut table = "| code | status | meaning |\n|---|---|---|".to_owned();
    for code in ErrorCode::ALL {
        let info = code_info(*code);
        table.push_str(&format!("\n| `{code}` | {} | {} |", info.status, info.meaning));
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_operation_has_a_row_and_every_code_an_operation() {
        let mut document = crate::http::openapi();
        let ids: BTreeSet<String> =
            document.paths.paths.values_mut().flat_map(operations).filter_map(|found| found.operation_id.clone()).collect();
        let rows: BTreeSet<String> = OPERATIONS.iter().map(|(id, _)| (*id).to_owned()).collect();
        assert_eq!((&rows, rows.len()), (&ids, OPERATIONS.len()));
        let shared = [ANY_REQUEST, SERVED, TOKEN, BODY].into_iter().chain(OPERATIONS.iter().map(|(_, codes)| *codes));
        let listed: BTreeSet<&str> = shared.flatten().map(|code| code.as_str()).collect();
        assert_eq!(listed, ErrorCode::ALL.iter().map(|code| code.as_str()).collect());
    }
}
