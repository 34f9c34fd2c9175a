//! Rewrites the errors of the JSON and query parsers for readers who do not know Rust's types. The broker uses it too.

/// The kinds of values that the parser expects, in Rust's words and in the words of the API.
const EXPECTED: [(&str, &str); 8] = [
    ("u64", "a whole number, 0 or more"),
    ("usize", "a whole number, 0 or more"),
    ("u32", "a whole number from 0 to 4294967295"),
    ("i32", "a whole number from -2147483648 to 2147483647"),
    ("i64", "a whole number"),
    ("a map", "an object"),
    ("a sequence", "an array"),
    ("unit", "null"),
];

/// Phrases of the parsers, and what they mean.
const PHRASES: [(&str, &str); 5] = [
    ("unknown field ", "unknown member "),
    ("unknown variant ", "unknown value "),
    ("invalid type: ", "wrong type: "),
    ("invalid digit found in string", "not a whole number, 0 or more"),
    ("cannot parse integer from empty string", "not a whole number, 0 or more"),
];

/// The parser's error in plain words. It has no line and column, because the error's JSON pointer says where the error is,
/// and the parsed text may differ from the text that the client sent.
pub fn in_words(error: &str) -> String {
    let text = error.split(" at line ").next().unwrap_or_default();
    let text = match text.strip_prefix("missing field ") {
        Some(member) => format!("the member {member} is missing"),
        None => text.to_owned(),
    };
    let text = match text.rsplit_once("expected ") {
        Some((before, expected)) => {
            let words = match expected.starts_with("struct ") {
                true => "an object",
                false => EXPECTED.iter().find(|(rust, _)| expected == *rust).map_or(expected, |(_, words)| words),
            };
            format!("{before}expected {words}")
        }
        None => text,
    };
    PHRASES.iter().fold(text, |text, (phrase, words)| text.replace(phrase, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parser_errors_have_no_rust_types_and_no_position() {
        for (error, expected) in [
            (
                r#"invalid type: string "7", expected u64 at line 1 column 20"#,
                r#"wrong type: string "7", expected a whole number, 0 or more"#,
            ),
            ("invalid value: integer `-1`, expected u64", "invalid value: integer `-1`, expected a whole number, 0 or more"),
            (
                "unknown field `max_byte`, expected one of `enabled`, `max_bytes` at line 1 column 105",
                "unknown member `max_byte`, expected one of `enabled`, `max_bytes`",
            ),
            ("missing field `size` at line 1 column 13", "the member `size` is missing"),
            ("invalid type: null, expected a sequence", "wrong type: null, expected an array"),
            ("invalid type: integer `1`, expected struct Policy", "wrong type: integer `1`, expected an object"),
            ("wait: invalid digit found in string", "wait: not a whole number, 0 or more"),
            ("not an RFC 3339 time", "not an RFC 3339 time"),
        ] {
            assert_eq!(in_words(error), expected);
        }
    }
}
