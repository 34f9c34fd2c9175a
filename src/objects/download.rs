//! How a browser is told to take a download: as a file under its name, and never as a page.

/// Whether a browser would run what is in such an object, in the name of the store's host.
pub(super) fn is_active(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    kind.ends_with("+xml")
        || kind.ends_with("/xml")
        || ["html", "javascript", "ecmascript", "jscript", "livescript", "xsl"].iter().any(|word| kind.contains(word))
}

/// `Content-Disposition` for a download (RFC 6266): an ASCII name for old agents, the real one as RFC 8187 writes it.
pub(super) fn disposition(filename: Option<&str>) -> String {
    let Some(filename) = filename.filter(|name| !name.is_empty()) else { return "attachment".to_owned() };
    // A name is not a path, and no agent needs to see a control character.
    let name: String = filename.chars().map(|c| if c.is_control() || matches!(c, '/' | '\\') { '_' } else { c }).collect();
    // Some agents undo percent signs in the plain form, so it has none.
    let plain: String = name.chars().map(|c| if c.is_ascii() && !matches!(c, '"' | '%') { c } else { '_' }).collect();
    let mut exact = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            exact.push(char::from(byte));
        } else {
            exact.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{exact}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_downloads_survive_and_do_no_harm() {
        let cases = [
            (None, "attachment".to_owned()),
            (Some(""), "attachment".to_owned()),
            (Some("a.mp4"), "attachment; filename=\"a.mp4\"; filename*=UTF-8''a.mp4".to_owned()),
            (Some("Zoë 1.mp4"), "attachment; filename=\"Zo_ 1.mp4\"; filename*=UTF-8''Zo%C3%AB%201.mp4".to_owned()),
            (Some("a\"; x=\"%41"), "attachment; filename=\"a_; x=__41\"; filename*=UTF-8''a%22%3B%20x%3D%22%2541".to_owned()),
            (Some("../a\\b\r\nc"), "attachment; filename=\".._a_b__c\"; filename*=UTF-8''.._a_b__c".to_owned()),
        ];
        for (name, expected) in cases {
            assert_eq!(disposition(name), expected);
        }
    }

    #[test]
    fn types_that_a_browser_would_run_are_known() {
        for active in [
            "text/html",
            "Text/HTML; charset=utf-8",
            "image/svg+xml",
            "application/xhtml+xml",
            "text/xml",
            "application/xml",
            "text/javascript",
            "application/javascript",
        ] {
            assert!(is_active(active), "{active}");
        }
        for inert in ["video/mp4", "application/json", "application/octet-stream", "text/plain", ""] {
            assert!(!is_active(inert), "{inert}");
        }
    }
}
