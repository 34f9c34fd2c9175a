//! The contract as a document, in a shape that generators make clean clients of.

use lfs_broker_client::api::{Integrity, Record};
use lfs_broker_client::pointer::Pointer;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::schema::{AdditionalProperties, ArrayItems, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OneOf, OpenApi, RefOr, Schema};
use utoipa::{Modify, ToSchema};
use uuid::Uuid;

/// What complete answers: `published` with 200, the others with 202. One type for both, because many generated clients have
/// one for a method's answers; `state` tells them apart.
#[derive(ToSchema)]
#[schema(discriminator(property_name = "state", mapping(
    ("published" = "#/components/schemas/Published"),
    ("verified" = "#/components/schemas/Verified"),
    ("completing" = "#/components/schemas/Completing")
)))]
#[serde(untagged)]
#[expect(dead_code, reason = "the client's type is what travels; here stands which of its members come when")]
pub(super) enum Completed {
    /// With 200.
    Published(Published),
    /// With 202.
    Verified(Verified),
    /// With 202.
    Completing(Completing),
}

/// The pointer is in Kafka, for good.
#[derive(ToSchema)]
#[schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "published",
    "pointer": {"kfs_lfs": 1, "bucket": "lfs", "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4", "created_at": "2026-11-21T06:35:59Z"},
    "integrity": "sha256", "record": {"topic": "videos", "partition": 3, "offset": 42, "timestamp": "2026-11-21T06:35:59.2Z"}}))]
#[expect(dead_code, reason = "as above")]
pub(super) struct Published {
    /// The upload.
    id: Uuid,
    #[schema(inline)]
    state: PublishedState,
    /// The record's value.
    pointer: Pointer,
    /// How far the bytes are proved.
    integrity: Integrity,
    /// Where the pointer is.
    record: Record,
}

/// The bytes are proved and promised: the pointer will reach Kafka.
#[derive(ToSchema)]
#[schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "verified",
    "pointer": {"kfs_lfs": 1, "bucket": "lfs", "key": "acme/videos/lfs/2026/11/21/01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "size": 5,
        "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "content_type": "video/mp4", "created_at": "2026-11-21T06:35:59Z"},
    "integrity": "sha256"}))]
#[expect(dead_code, reason = "as above")]
pub(super) struct Verified {
    /// The upload.
    id: Uuid,
    #[schema(inline)]
    state: VerifiedState,
    /// The record's value.
    pointer: Pointer,
    /// How far the bytes are proved.
    integrity: Integrity,
}

/// The bytes are being read again: nothing is promised yet.
#[derive(ToSchema)]
#[schema(example = json!({"id": "01934d2e-7c00-7000-8000-5f2b8c1d9e3a", "state": "completing"}))]
#[expect(dead_code, reason = "as above")]
pub(super) struct Completing {
    /// The upload.
    id: Uuid,
    #[schema(inline)]
    state: CompletingState,
}

macro_rules! one_word {
    ($($(#[$meaning:meta])+ $name:ident { $word:ident })+) => {$(
        $(#[$meaning])+
        #[derive(ToSchema)]
        #[schema(rename_all = "lowercase")]
        #[expect(dead_code, reason = "as above")]
        enum $name {
            $word,
        }
    )+};
}
one_word! {
    /// The pointer is in Kafka. Final.
    PublishedState { Published }
    /// The bytes are proved; the pointer will reach Kafka.
    VerifiedState { Verified }
    /// The bytes are being read; ask again.
    CompletingState { Completing }
}

/// An OpenAPI document, as far as clients have a use for its members.
#[derive(ToSchema)]
#[schema(example = json!({"openapi": "3.1.0", "info": {"title": "lfs-broker", "version": "0.1.0"}}))]
#[expect(dead_code, reason = "as above")]
pub(super) struct Contract {
    /// The version of OpenAPI.
    #[schema(example = "3.1.0")]
    openapi: String,
    #[schema(inline)]
    info: ContractInfo,
}

/// Whose contract it is.
#[derive(ToSchema)]
#[expect(dead_code, reason = "as above")]
struct ContractInfo {
    /// The product.
    #[schema(example = "lfs-broker")]
    title: String,
    /// Its version.
    #[schema(example = "0.1.0")]
    version: String,
}

/// What the macros cannot say: the token, and that a member is left out where there is nothing to say.
pub(super) struct Finish;

impl Modify for Finish {
    fn modify(&self, document: &mut OpenApi) {
        let components = document.components.get_or_insert_default();
        let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build());
        components.add_security_scheme("bearer", bearer);
        for schema in components.schemas.values_mut() {
            leave_out(schema);
        }
        for path in document.paths.paths.values_mut() {
            optional_body(path);
        }
    }
}

/// A member of an answer that may be absent is left out rather than null: `T | undefined` is what a client then has to
/// look at, not `T | null | undefined`. A member with a default, or one that is always there, keeps its null; so does
/// everything in a request, where the broker takes null for absent, and openapi-generator's Java would send an empty
/// list in place of none.
fn leave_out(schema: &mut RefOr<Schema>) {
    let RefOr::T(schema) = schema else { return };
    match schema {
        Schema::AllOf(all) => all.items.iter_mut().for_each(leave_out),
        Schema::OneOf(one) => bare(one),
        Schema::Object(object) => {
            // Requests refuse members that they do not know.
            let request = matches!(object.additional_properties.as_deref(), Some(AdditionalProperties::FreeForm(false)));
            for (name, member) in &mut object.properties {
                match member {
                    _ if !request && !object.required.contains(name) => without_null(member),
                    RefOr::T(Schema::OneOf(one)) => bare(one),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

/// A reference among several has no description of its own: openapi-generator takes one that has for a schema without
/// a name. That of a value that may be null stands above the two.
fn bare(one: &mut OneOf) {
    let nullable = one.items.iter().any(is_null);
    for item in &mut one.items {
        if let RefOr::Ref(place) = item {
            let description = std::mem::take(&mut place.description);
            if nullable && !description.is_empty() {
                one.description = Some(description);
            }
        }
    }
}

/// A body that may be left out is not null either.
fn optional_body(path: &mut PathItem) {
    let bodies = path.post.iter_mut().chain(&mut path.put).filter_map(|operation| operation.request_body.as_mut());
    for body in bodies {
        let RefOr::T(body) = body else { continue };
        for content in body.content.values_mut() {
            if let RefOr::T(Content { schema: Some(schema), .. }) = content {
                without_null(schema);
            }
        }
    }
}

fn without_null(member: &mut RefOr<Schema>) {
    let RefOr::T(schema) = member else { return };
    match schema {
        Schema::OneOf(one) if one.default.is_none() => {
            one.items.retain(|item| !is_null(item));
            if let [only @ RefOr::Ref(_)] = one.items.as_slice() {
                *member = only.clone();
            }
        }
        Schema::Object(object) if object.default.is_none() => only_type(&mut object.schema_type),
        Schema::Array(array) if array.default.is_none() => {
            only_type(&mut array.schema_type);
            if let ArrayItems::RefOrSchema(items) = &mut array.items {
                leave_out(items);
            }
        }
        _ => {}
    }
}

fn is_null(schema: &RefOr<Schema>) -> bool {
    matches!(schema, RefOr::T(Schema::Object(object)) if object.schema_type == SchemaType::Type(Type::Null))
}

fn only_type(schema_type: &mut SchemaType) {
    if let SchemaType::Array(types) = schema_type {
        types.retain(|kind| *kind != Type::Null);
        if let [only] = types.as_slice() {
            *schema_type = SchemaType::Type(only.clone());
        }
    }
}
