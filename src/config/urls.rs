//! URLs and origins among the settings, held against what browsers and clients make of them.

use super::{Error, wrong};

/// Whether it is `http://host` or `https://host`, and what may follow.
fn is_base(url: &str) -> bool {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).unwrap_or_default();
    let (host, _) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let sound = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#\"<>\\@".contains(&byte));
    !host.is_empty() && sound(rest)
}

/// The host that a URL names.
pub(super) fn host(url: &str) -> Option<String> {
    reqwest::Url::parse(url).ok()?.host_str().map(str::to_owned)
}

pub(super) fn public_url(url: Option<String>) -> Result<Option<String>, Error> {
    match url {
        Some(url) if !is_base(&url) => Err(wrong("LFS_BROKER_PUBLIC_URL", &url, "a URL such as https://lfs.example.net")),
        url => Ok(url),
    }
}

/// An origin as browsers write it (RFC 6454, section 6.2); what they never write would silently match nothing.
pub(crate) fn origin(origin: &str) -> Result<String, Error> {
    if origin == "*" {
        return Ok(origin.to_owned());
    }
    let wrong = |hint: &str| Err(Error::Origin { value: origin.to_owned(), hint: hint.to_owned() });
    if origin == "null" {
        return wrong("pages without an origin of their own are let in by * only");
    }
    let Ok(url) = reqwest::Url::parse(origin) else { return wrong("* or origins such as https://app.example.net") };
    if !matches!(url.scheme(), "http" | "https") {
        return wrong("an origin begins with http:// or https://");
    }
    if url.host_str().is_some_and(|host| host.contains('*')) {
        return wrong("browsers name one host, so a * within a name never matches: list each origin, or * alone");
    }
    let written = url.origin().ascii_serialization();
    match written == origin {
        true => Ok(written),
        false => wrong(&format!("browsers write {written}")),
    }
}
