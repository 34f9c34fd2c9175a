//! The architecture, checked in the source: no two files import each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The sources of one crate: the path of each file under `src`, and its text.
type Sources = BTreeMap<String, String>;

fn sources(root: &Path) -> Sources {
    let mut sources = Sources::new();
    let mut directories: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
                sources.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    sources
}

/// The code of a file, without comments and tests.
fn code(text: &str) -> String {
    let body = text.split("#[cfg(test)]").next().unwrap_or_default();
    body.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The module path of a file: `a/b.rs` and `a/b/mod.rs` are `a::b`, and the root of the crate is empty.
fn module(file: &str) -> Vec<String> {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    if matches!(path, "lib" | "main") { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// The tokens that matter in a path: names, `::`, `{`, `}` and `,`. Any other character is a token of its own.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let name = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        let length = if name > 0 {
            name
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(rest[..length].to_owned());
        rest = rest[length..].trim_start();
    }
    tokens
}

/// Reads one path or one group of paths, and appends each whole path to `paths`. Returns the index after it.
fn read_paths(tokens: &[String], mut at: usize, prefix: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let token = |at: usize| tokens.get(at).map_or("", String::as_str);
    let mut path = prefix.to_vec();
    loop {
        if token(at) == "{" {
            at += 1;
            while !matches!(token(at), "}" | "") {
                at = read_paths(tokens, at, &path, paths);
                // Skips the comma, and `as name`.
                while !matches!(token(at), "}" | "," | "") {
                    at += 1;
                }
                at += usize::from(token(at) == ",");
            }
            return at + 1;
        }
        path.push(token(at).to_owned());
        if token(at + 1) != "::" {
            paths.push(path);
            return at + 1;
        }
        at += 2;
    }
}

/// The whole paths that a file names with `crate::` and `super::`.
fn imported_paths(file: &str, text: &str) -> Vec<Vec<String>> {
    let (own, tokens) = (module(file), tokens(&code(text)));
    let (mut paths, mut at) = (Vec::new(), 0);
    while at + 1 < tokens.len() {
        let begins_path = at == 0 || tokens[at - 1] != "::";
        let mut base = match tokens[at].as_str() {
            "crate" if begins_path => Vec::new(),
            "super" if begins_path && !own.is_empty() => own[..own.len() - 1].to_vec(),
            _ => {
                at += 1;
                continue;
            }
        };
        if tokens[at + 1] != "::" {
            at += 1;
            continue;
        }
        at += 2;
        while tokens.get(at).is_some_and(|token| token == "super") && tokens.get(at + 1).is_some_and(|token| token == "::") {
            base.pop();
            at += 2;
        }
        at = read_paths(&tokens, at, &base, &mut paths);
    }
    paths
}

/// Every pair of files that import each other.
///
/// A module may use its own submodules by their bare names, and a submodule may use `super::`: that is how Rust splits one
/// module into files. The pair counts as soon as the module names the submodule with its whole path.
fn circles(sources: &Sources) -> Vec<String> {
    let is_source = |file: &str| file != "main.rs" && !file.ends_with("tests.rs");
    let files: BTreeMap<Vec<String>, &str> =
        sources.keys().filter(|file| is_source(file)).map(|file| (module(file), file.as_str())).collect();
    let mut imports = BTreeSet::new();
    for (file, text) in sources.iter().filter(|(file, _)| is_source(file)) {
        for path in imported_paths(file, text) {
            // The longest beginning of the path that is a module; what follows it is an item of this module.
            let imported = (0..=path.len()).rev().find_map(|length| files.get(&path[..length]));
            imports.extend(imported.map(|imported| (file.as_str(), *imported)));
        }
    }
    let circles = imports.iter().filter(|(file, imported)| file < imported && imports.contains(&(*imported, *file)));
    circles.map(|(file, imported)| format!("{file} and {imported} import each other")).collect()
}

#[test]
fn no_two_files_import_each_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (directory, least) in [("src", 100), ("client/src", 20)] {
        let sources = sources(&root.join(directory));
        assert!(sources.len() > least, "{} files in {directory}", sources.len());
        let circles = circles(&sources);
        assert!(circles.is_empty(), "{directory}: {}", circles.join("; "));
    }
}

#[test]
fn files_that_import_each_other_are_found() {
    let found = |files: &[(&str, &str)]| {
        circles(&files.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect()).len()
    };
    assert_eq!(found(&[("a.rs", "use crate::b::B;"), ("b.rs", "use crate::a;")]), 1);
    assert_eq!(found(&[("a.rs", "use crate::{c, b::{self, B}};"), ("b.rs", "fn f() { crate::a::g() }"), ("c.rs", "")]), 1);
    assert_eq!(found(&[("a/mod.rs", "mod b;\nmod c;"), ("a/b.rs", "use super::c::C;"), ("a/c.rs", "use super::b as d;")]), 1);
    assert_eq!(found(&[("a/mod.rs", ""), ("a/b.rs", "use super::{c::C, A};"), ("a/c.rs", "use crate::a::b::B;")]), 1);
    assert_eq!(found(&[("a/b.rs", "use super::super::c::C;"), ("c.rs", "use crate::a::b;")]), 1);
    assert_eq!(found(&[("a/mod.rs", "use crate::a::b::B;"), ("a/b.rs", "use super::A;")]), 1);

    assert_eq!(found(&[("a.rs", "use crate::b::B;"), ("b.rs", "// crate::a\n#[cfg(test)]\nmod tests { use crate::a; }")]), 0);
    assert_eq!(found(&[("a.rs", "use crate::b::B;"), ("b.rs", ""), ("b/tests.rs", "use crate::a;")]), 0);
    assert_eq!(found(&[("a/mod.rs", "mod b;\nuse b::B;"), ("a/b.rs", "use super::A;")]), 0);
    assert_eq!(found(&[("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c::C;"), ("c.rs", "use crate::a::A;")]), 0);
}
