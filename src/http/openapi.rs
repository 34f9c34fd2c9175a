//! The OpenAPI document, adjusted so that code generators produce clean clients.

use lfs_broker_client::api::UploadState;
use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayItems, Components, Discriminator, ObjectBuilder, OneOfBuilder, SchemaType, Type,
};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, OneOf, OpenApi, Ref, RefOr, Schema};
use utoipa::{Modify, ToSchema};

use super::error_responses;

/// The response of complete, by state: the name of the schema, its members besides `state`, and its description.
const COMPLETED: [(UploadState, &str, &[&str], &str); 3] = [
    (
        UploadState::Published,
        "Published",
        &["id", "pointer", "integrity", "record"],
        "The pointer is published in Kafka. This state is final.",
    ),
    (
        UploadState::Verified,
        "Verified",
        &["id", "pointer", "integrity"],
        "The bytes are verified and the pointer is queued: it will be published to Kafka.",
    ),
    (
        UploadState::Completing,
        "Completing",
        &["id"],
        "The object's bytes are being read to verify them. The upload is not accepted yet: retry the request.",
    ),
];

/// An OpenAPI document, with the members that clients may use.
#[derive(ToSchema)]
#[schema(example = json!({"openapi": "3.1.0", "info": {"title": "lfs-broker", "version": "0.1.0"}}))]
#[expect(dead_code, reason = "documentation only: the document itself is served")]
pub(super) struct Contract {
    /// The OpenAPI version.
    #[schema(example = "3.1.0")]
    openapi: String,
    #[schema(inline)]
    info: ContractInfo,
}

/// The product and its version.
#[derive(ToSchema)]
#[expect(dead_code, reason = "as above")]
struct ContractInfo {
    /// The product name.
    #[schema(example = "lfs-broker")]
    title: String,
    /// The product version.
    #[schema(example = "0.1.0")]
    version: String,
}

/// Names of enum values for generated code. openapi-generator's Go client puts the values of all enums into one namespace, in which
/// `sha256` and `none` of two enums would clash. The values in JSON do not change.
const VALUE_NAMES: [(&str, &[&str]); 2] = [
    ("Integrity", &["SIZE", "CHECKSUM", "PARTS_SHA256", "WHOLE_SHA256"]),
    ("Next", &["PUT", "PARTS", "COMPLETE", "WAIT", "NOTHING"]),
];

/// Adds what the macros cannot express: the bearer token, error responses, absent members instead of null, and members that
/// depend on a state.
pub(super) struct PostProcess;

impl Modify for PostProcess {
    fn modify(&self, document: &mut OpenApi) {
        error_responses::add(document);
        let components = document.components.get_or_insert_default();
        let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build());
        components.add_security_scheme("bearer", bearer);
        for (name, values) in VALUE_NAMES {
            if let Some(RefOr::T(Schema::Object(schema))) = components.schemas.get_mut(name) {
                schema.extensions = Some(Extensions::from_iter([("x-enum-varnames", values)]));
            }
        }
        for schema in components.schemas.values_mut() {
            omit_nulls(schema);
        }
        split_completed(components);
        for path in document.paths.paths.values_mut() {
            make_body_optional(path);
        }
    }
}

/// Splits the schema of complete's response by state, with the discriminator `state`. It stays one type, because many generated
/// clients have only one response type for each method.
fn split_completed(components: &mut Components) {
    let Some(RefOr::T(Schema::Object(all))) = components.schemas.remove("Completed") else { return };
    let mapping = COMPLETED.map(|(state, name, _, _)| (state.name(), Ref::from_schema_name(name).ref_location));
    let mut response = OneOfBuilder::new()
        .description(all.description.clone())
        .discriminator(Some(Discriminator::with_mapping("state", mapping)));
    for (state, name, members, description) in COMPLETED {
        let is_member = |member: &String| member == "state" || members.contains(&member.as_str());
        let mut schema = all.clone();
        schema.description = Some(description.to_owned());
        schema.properties.retain(|member, _| is_member(member));
        schema.required = schema.properties.keys().cloned().collect();
        let only =
            ObjectBuilder::new().schema_type(Type::String).enum_values(Some([state.name()])).description(Some(description));
        schema.properties.insert("state".to_owned(), only.build().into());
        if let Some(example) = schema.example.as_mut().and_then(|example| example.as_object_mut()) {
            example.retain(|member, _| is_member(member));
            example.insert("state".to_owned(), state.name().into());
        }
        components.schemas.insert(name.to_owned(), RefOr::T(Schema::Object(schema)));
        response = response.item(Ref::from_schema_name(name));
    }
    components.schemas.insert("Completed".to_owned(), RefOr::T(Schema::OneOf(response.build())));
}

/// Removes null from the optional members of responses: the broker omits such a member instead of sending null. Clients then
/// handle `T | undefined`, not `T | null | undefined`. Members that are required or have a default keep null.
/// Requests keep null too: the broker reads null as absent. Without null, openapi-generator's Java client would send an empty
/// list instead of nothing.
fn omit_nulls(schema: &mut RefOr<Schema>) {
    let RefOr::T(schema) = schema else { return };
    match schema {
        Schema::AllOf(all) => all.items.iter_mut().for_each(omit_nulls),
        Schema::OneOf(one) => strip_ref_descriptions(one),
        Schema::Object(object) => {
            // Only request schemas refuse unknown members.
            let request = matches!(object.additional_properties.as_deref(), Some(AdditionalProperties::FreeForm(false)));
            for (name, member) in &mut object.properties {
                match member {
                    _ if !request && !object.required.contains(name) => remove_null(member),
                    RefOr::T(Schema::OneOf(one)) => strip_ref_descriptions(one),
                    _ => {}
                }
            }
        }
        _ => {}
    }
}

/// Removes descriptions from references inside a `oneOf`: openapi-generator treats a reference with a description as an unnamed
/// schema. The description of a nullable reference moves to the `oneOf`.
fn strip_ref_descriptions(one: &mut OneOf) {
    let nullable = one.items.iter().any(is_null);
    for item in &mut one.items {
        if let RefOr::Ref(reference) = item {
            let description = std::mem::take(&mut reference.description);
            if nullable && !description.is_empty() {
                one.description = Some(description);
            }
        }
    }
}

/// Removes null from optional request bodies: they are either present or absent.
fn make_body_optional(path: &mut PathItem) {
    let bodies = path.post.iter_mut().chain(&mut path.put).filter_map(|operation| operation.request_body.as_mut());
    for body in bodies {
        let RefOr::T(body) = body else { continue };
        for content in body.content.values_mut() {
            if let RefOr::T(Content { schema: Some(schema), .. }) = content {
                remove_null(schema);
            }
        }
    }
}

fn remove_null(member: &mut RefOr<Schema>) {
    let RefOr::T(schema) = member else { return };
    match schema {
        Schema::OneOf(one) if one.default.is_none() => {
            one.items.retain(|item| !is_null(item));
            if let [only @ RefOr::Ref(_)] = one.items.as_slice() {
                *member = only.clone();
            }
        }
        Schema::Object(object) if object.default.is_none() => remove_null_type(&mut object.schema_type),
        Schema::Array(array) if array.default.is_none() => {
            remove_null_type(&mut array.schema_type);
            if let ArrayItems::RefOrSchema(items) = &mut array.items {
                omit_nulls(items);
            }
        }
        _ => {}
    }
}

fn is_null(schema: &RefOr<Schema>) -> bool {
    matches!(schema, RefOr::T(Schema::Object(object)) if object.schema_type == SchemaType::Type(Type::Null))
}

fn remove_null_type(schema_type: &mut SchemaType) {
    if let SchemaType::Array(types) = schema_type {
        types.retain(|kind| *kind != Type::Null);
        if let [only] = types.as_slice() {
            *schema_type = SchemaType::Type(only.clone());
        }
    }
}
