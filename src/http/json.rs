//! JSON bodies: strict parsing, and errors that name the member and say in plain words what is wrong.

use std::collections::HashSet;
use std::fmt;

use lfs_broker_client::api::{ErrorCode, FieldError};
use lfs_broker_client::json_words::in_words;
use serde::de::{DeserializeOwned, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::problem::Problem;

/// Checks for valid JSON without repeated members.
pub(super) fn check_json(bytes: &[u8]) -> Result<(), Problem> {
    if bytes.trim_ascii().is_empty() {
        return Err(Problem::new(ErrorCode::MalformedJson, "the body is empty"));
    }
    serde_json::from_slice::<StrictJson>(bytes)
        .map(|_| ())
        .map_err(|error| Problem::new(ErrorCode::MalformedJson, json_error(&error)))
}

/// The parser's error in plain words, with its line and column.
fn json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text.replace("expected ident", "unexpected text").replace("EOF while parsing", "it ends inside");
    let phrases =
        [("number out of range", "the number is too large"), ("recursion limit exceeded", "the body is nested too deeply")];
    match phrases.into_iter().find(|(phrase, _)| text.starts_with(phrase)) {
        Some((phrase, words)) => text.replacen(phrase, words, 1),
        None if error.is_data() => text,
        None => format!("the body is not JSON: {text}"),
    }
}

/// The error of a member in plain words.
fn member_error(text: &str) -> String {
    // The parser reads a whole number of more than 64 bits as a floating point number.
    const TOO_LARGE: f64 = 18_446_744_073_709_551_616.0;
    let number = text.strip_prefix("invalid type: floating point `").and_then(|rest| rest.split('`').next());
    match number.and_then(|number| number.parse::<f64>().ok()) {
        Some(number) if number >= TOO_LARGE => "the number is too large".to_owned(),
        _ => in_words(text),
    }
}

/// Parses in two passes: the first checks for valid JSON without repeated members, the second for the expected fields.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    check_json(bytes)?;
    // By default, serde also reads a struct from an array, by position.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(Problem::invalid(vec![FieldError::new("", "the body must be an object")]));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let pointer: String = error.path().iter().map(segment).collect();
        Problem::invalid(vec![FieldError::new(&pointer, member_error(&error.inner().to_string()))])
    })
}

fn segment(segment: &serde_path_to_error::Segment) -> String {
    use serde_path_to_error::Segment;
    match segment {
        Segment::Seq { index } => format!("/{index}"),
        Segment::Map { key } => format!("/{}", key.replace('~', "~0").replace('/', "~1")),
        Segment::Enum { .. } | Segment::Unknown => String::new(),
    }
}

/// Any JSON without repeated members. Two parsers could read a repeated member differently.
struct StrictJson;

impl<'de> Deserialize<'de> for StrictJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StrictVisitor;
        impl<'de> Visitor<'de> for StrictVisitor {
            type Value = StrictJson;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_bool<E>(self, _: bool) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_i64<E>(self, _: i64) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_u64<E>(self, _: u64) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_f64<E>(self, _: f64) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_str<E>(self, _: &str) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_unit<E>(self) -> Result<StrictJson, E> {
                Ok(StrictJson)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<StrictJson, A::Error> {
                while seq.next_element::<StrictJson>()?.is_some() {}
                Ok(StrictJson)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<StrictJson, A::Error> {
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    map.next_value::<StrictJson>()?;
                    if let Some(name) = names.replace(name) {
                        return Err(serde::de::Error::custom(format!("member {name:?} is repeated")));
                    }
                }
                Ok(StrictJson)
            }
        }
        deserializer.deserialize_any(StrictVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lfs_broker_client::api::OpenUpload;
    use proptest::prelude::*;

    fn code(json: &str) -> String {
        match parse::<OpenUpload>(json.as_bytes()) {
            Ok(_) => "ok".to_owned(),
            Err(problem) => {
                format!("{} {}", problem.code, problem.errors.first().map(|error| error.pointer.as_str()).unwrap_or_default())
            }
        }
    }

    #[test]
    fn malformed_json_and_invalid_requests_get_different_codes() {
        assert_eq!(code(r#"{"topic":"t","size":1}"#), "ok");
        assert_eq!(code(r#"{"topic":"t","size":1"#), "malformed-json ");
        assert_eq!(code(r#"{"topic":"t","size":1,"size":2}"#), "malformed-json ");
        assert_eq!(code(r#"{"topic":"t","size":1,"headers":{"a":"1","a":"2"}}"#), "malformed-json ");
        assert_eq!(code(r#"{"topic":"t","size":1,"x":{"y":[{"a":1,"a":2}]}}"#), "malformed-json ");
        assert_eq!(code(&format!("{}1{}", "[".repeat(200), "]".repeat(200))), "malformed-json ");
        assert_eq!(code(r#"{"topic":"t","size":1e999}"#), "malformed-json ");
        assert_eq!(code(r#"{"topic":"t","size":-1}"#), "validation-failed /size");
        assert_eq!(code(r#"{"topic":"t","size":18446744073709551616}"#), "validation-failed /size");
        assert_eq!(code(r#"{"topic":"t","size":1,"state":"published"}"#), "validation-failed /state");
        assert_eq!(code(r#"{"topic":"t","size":1,"part_sha256":["x"]}"#), "validation-failed /part_sha256/0");
        assert_eq!(code("[]"), "validation-failed ");
        assert_eq!(code(r#"["t",1]"#), "validation-failed ");
        assert_eq!(code("null"), "validation-failed ");
    }

    #[test]
    fn errors_of_the_body_say_what_is_wrong_with_it() {
        let detail = |json: &str| match parse::<OpenUpload>(json.as_bytes()) {
            Ok(_) => "ok".to_owned(),
            Err(problem) => problem.detail,
        };
        for (json, expected) in [
            ("", "the body is empty"),
            (" \n", "the body is empty"),
            ("nonsense", "the body is not JSON: unexpected text at line 1 column 2"),
            ("{", "the body is not JSON: it ends inside an object at line 1 column 1"),
            (r#"{"a":1,"a":2}"#, r#"member "a" is repeated at line 1 column 13"#),
            (r#"{"size":1e999}"#, "the number is too large at line 1 column 13"),
            (r#"{"topic":"t","size":99999999999999999999}"#, "the number is too large"),
            (r#"{"topic":"t","size":1.5}"#, "wrong type: floating point `1.5`, expected a whole number, 0 or more"),
        ] {
            assert_eq!(detail(json), expected, "{json}");
        }
    }

    #[test]
    fn headers_keep_their_order() {
        let request: OpenUpload = parse(br#"{"topic":"t","size":1,"headers":{"z":"1","a":"2"}}"#).unwrap();
        assert_eq!(request.headers.0, [("z".to_owned(), "1".to_owned()), ("a".to_owned(), "2".to_owned())]);
    }

    proptest! {
        #[test]
        fn no_body_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse::<OpenUpload>(&bytes);
        }
    }
}
