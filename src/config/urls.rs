//! Validation of URLs and CORS origins, by the rules of browsers and HTTP clients.

use super::error::Error;

/// Whether the URL is `http://host` or `https://host`, optionally with a path.
fn is_base_url(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).unwrap_or_default();
    let (host_part, _) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let is_valid = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"<>\\@".contains(&byte));
    !host_part.is_empty() && is_valid(rest)
}

/// The host of a URL.
pub(super) fn url_host(url: &str) -> Option<String> {
    reqwest::Url::parse(url).ok()?.host_str().map(str::to_owned)
}

pub(super) fn public_url(url: Option<String>) -> Result<Option<String>, Error> {
    match url {
        Some(url) if !is_base_url(&url) => {
            Err(Error::value("LFS_BROKER_PUBLIC_URL", &url, "a URL such as https://lfs.example.net"))
        }
        url => Ok(url),
    }
}

/// Checks an origin. It must have the form that browsers send (RFC 6454, section 6.2), else it would silently match nothing.
pub(crate) fn parse_origin(origin: &str) -> Result<String, Error> {
    if origin == "*" {
        return Ok(origin.to_owned());
    }
    let invalid = |hint: &str| Err(Error::Origin { value: origin.to_owned(), hint: hint.to_owned() });
    if origin == "null" {
        return invalid("only * allows pages without an origin of their own");
    }
    let Ok(url) = reqwest::Url::parse(origin) else { return invalid("use * or an origin such as https://app.example.net") };
    if !matches!(url.scheme(), "http" | "https") {
        return invalid("an origin begins with http:// or https://");
    }
    if url.host_str().is_some_and(|name| name.contains('*')) {
        return invalid("a browser sends one host name, so a * inside a name never matches: list each origin, or use * alone");
    }
    let canonical = url.origin().ascii_serialization();
    match canonical == origin {
        true => Ok(canonical),
        false => invalid(&format!("browsers send {canonical}")),
    }
}
