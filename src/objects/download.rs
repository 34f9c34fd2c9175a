//! Response headers of a download: a browser saves the object as a file and never renders it as a page.

/// The content type for a download: the object's own type if no browser executes it, else `application/octet-stream`.
///
/// The uploader chose the stored type, and a pointer may name another type or none. So the response always sets a type,
/// and only a type that is known to be inert.
pub(super) fn safe_content_type(content_type: Option<&str>) -> String {
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

/// `Content-Disposition` for a download (RFC 6266): an ASCII name for old browsers, and the exact name encoded by RFC 8187.
pub(super) fn content_disposition(filename: Option<&str>) -> String {
    let Some(filename) = filename.filter(|name| !name.is_empty()) else { return "attachment".to_owned() };
    // A path separator could move the file to another folder, and a control character could break the header.
    let name: String = filename.chars().map(|c| if c.is_control() || matches!(c, '/' | '\\') { '_' } else { c }).collect();
    // Some browsers decode percent signs in the ASCII name, so it contains none.
    let ascii: String = name.chars().map(|c| if c.is_ascii() && !matches!(c, '"' | '%') { c } else { '_' }).collect();
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("attachment; filename=\"{ascii}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_keeps_its_file_name_and_no_file_name_can_break_the_header() {
        let cases = [
            (None, "attachment".to_owned()),
            (Some(""), "attachment".to_owned()),
            (Some("a.mp4"), "attachment; filename=\"a.mp4\"; filename*=UTF-8''a.mp4".to_owned()),
            (Some("Zoë 1.mp4"), "attachment; filename=\"Zo_ 1.mp4\"; filename*=UTF-8''Zo%C3%AB%201.mp4".to_owned()),
            (Some("a\"; x=\"%41"), "attachment; filename=\"a_; x=__41\"; filename*=UTF-8''a%22%3B%20x%3D%22%2541".to_owned()),
            (Some("../a\\b\r\nc"), "attachment; filename=\".._a_b__c\"; filename*=UTF-8''.._a_b__c".to_owned()),
        ];
        for (name, expected) in cases {
            assert_eq!(content_disposition(name), expected);
        }
    }

    #[test]
    fn a_download_has_its_own_content_type_only_if_browsers_do_not_execute_it() {
        for inert in ["video/mp4", "audio/ogg", "image/png", "text/plain", "application/json", "font/woff2"] {
            assert_eq!(safe_content_type(Some(inert)), inert);
            assert_eq!(safe_content_type(Some(&format!("{}; charset=utf-8", inert.to_ascii_uppercase()))), inert);
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
            assert_eq!(safe_content_type(Some(active)), "application/octet-stream", "{active}");
        }
        assert_eq!(safe_content_type(None), "application/octet-stream");
    }
}
