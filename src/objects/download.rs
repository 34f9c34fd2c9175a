//! How a browser is told to take a download: as a file under its name, and never as a page.

/// What a browser is told that an object is: its own type where none of its readers runs anything, else mere bytes.
///
/// Whoever stored the object chose the type that the store remembers, and a pointer may say another or none. So a
/// type is always named, and only one that is known to be inert.
pub(super) fn safe_type(content_type: Option<&str>) -> String {
    let kind = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_token =
        |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&byte));
    let inert = match kind.split_once('/') {
        Some(("audio" | "video" | "font", name)) => is_token(name) && !name.ends_with("xml"),
        Some(("image", "avif" | "bmp" | "gif" | "heic" | "jpeg" | "png" | "tiff" | "webp")) => true,
        Some(("text", "csv" | "plain")) => true,
        Some(("application", "gzip" | "json" | "x-ndjson" | "x-tar" | "zip" | "zstd")) => true,
        _ => false,
    };
    if inert { kind } else { "application/octet-stream".to_owned() }
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
    fn only_inert_types_are_named() {
        for inert in ["video/mp4", "audio/ogg", "image/png", "text/plain", "application/json", "font/woff2"] {
            assert_eq!(safe_type(Some(inert)), inert);
            assert_eq!(safe_type(Some(&format!("{}; charset=utf-8", inert.to_ascii_uppercase()))), inert);
        }
        for active in [
            "text/html",
            "Text/HTML; charset=utf-8",
            "image/svg+xml",
            "video/x+xml",
            "application/xhtml+xml",
            "text/xml",
            "text/javascript",
            "application/javascript",
            "application/pdf",
            "application/x-shockwave-flash",
            "multipart/x-mixed-replace",
            "video/",
            "video/a b",
            "video/mp4\r\nx: y",
            "video/mp4,text/html",
            "video",
            "",
        ] {
            assert_eq!(safe_type(Some(active)), "application/octet-stream", "{active}");
        }
        assert_eq!(safe_type(None), "application/octet-stream");
    }
}
