//! `pghoard_create_keys`: a new key pair, printed or put into the configuration file.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use clap::Parser;
use serde_json::{Map, Value, json};

use super::pghoard::{fatal, parse, python_text};
use super::render;
use crate::codec::{KeyId, NewKeyPair};
use crate::runtime::variable;
use crate::serve::pghoard_json;

/// Encryption key generation tool.
#[derive(Debug, Parser)]
#[command(name = "pghoard_create_keys", version, infer_long_args = true)]
struct Options {
    /// Enable debug logging
    #[arg(short = 'D', long)]
    debug: bool,
    /// Backup site
    #[arg(long)]
    site: Option<String>,
    #[arg(long, help = "Key alias as used with the encryption_key_id configuration directive")]
    key_id: String,
    /// Length of the generated key in bits: 2048, 3072, 4096 or 8192
    #[arg(long, default_value_t = 3072)]
    bits: u32,
    #[arg(help = "Configuration file to store the keys in [env: PGHOARD_CONFIG]")]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(arguments: &[OsString]) -> ExitCode {
    let options: Options = match parse(arguments) {
        Ok(options) => options,
        Err(status) => return status,
    };
    fatal(create(&options), "CommandError")
}

fn create(options: &Options) -> anyhow::Result<()> {
    KeyId::new(&options.key_id)?;
    let config = options.config.clone().or_else(|| variable("PGHOARD_CONFIG").map(PathBuf::from));
    // Everything that can be refused is, before the work begins.
    let Some(path) = config else {
        let site = options.site.as_deref();
        let site =
            site.ok_or_else(|| anyhow!("Site must be defined if configuration file is not provided"))?;
        let keys = generate(options.bits)?;
        let document = json!({ "backup_sites": { site: with_key(Map::new(), &options.key_id, &keys)? } });
        return render::line(pghoard_json(&document));
    };
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let mut document: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is not JSON", path.display()))?;
    let site = add_to(&mut document, options, &path)?;
    write(&path, &document).with_context(|| format!("cannot write `{}`", path.display()))?;
    render::line(format_args!(
        "Saved new key_id {} for site {} in {}",
        python_text(&options.key_id),
        python_text(&site),
        python_text(&path.display().to_string())
    ))?;
    render::line(
        "NOTE: The pghoard daemon does not require the 'private' key in its configuration file, it can be \
         stored elsewhere to improve security",
    )
}

fn generate(bits: u32) -> anyhow::Result<NewKeyPair> {
    NewKeyPair::of_bits(bits).ok_or_else(|| anyhow!("a key of {bits} bits cannot be made; take 3072"))
}

/// Puts a new key into the configuration; gives the name of the site it belongs to.
fn add_to(document: &mut Value, options: &Options, path: &Path) -> anyhow::Result<String> {
    let sites = document.get_mut("backup_sites").and_then(Value::as_object_mut);
    let sites = sites.filter(|sites| !sites.is_empty());
    let sites = sites.ok_or_else(|| anyhow!("No backup sites defined in configuration"))?;
    let name = match &options.site {
        Some(name) => name.clone(),
        None if sites.len() == 1 => sites.keys().next().cloned().unwrap_or_default(),
        None => bail!("Backup site not set and configuration file defines {} sites", sites.len()),
    };
    let site = sites.get_mut(&name).and_then(Value::as_object_mut);
    let site =
        site.ok_or_else(|| anyhow!("Site {} not defined in configuration file", python_text(&name)))?;
    if site.get("encryption_keys").and_then(|keys| keys.get(&options.key_id)).is_some() {
        let (id, name, path) =
            (python_text(&options.key_id), python_text(&name), python_text(&path.display().to_string()));
        bail!("key_id {id} already defined for site {name} in {path}");
    }
    *site = with_key(std::mem::take(site), &options.key_id, &generate(options.bits)?)?;
    Ok(name)
}

/// A site with one more key, which is used for writing from now on.
fn with_key(mut site: Map<String, Value>, id: &str, keys: &NewKeyPair) -> anyhow::Result<Map<String, Value>> {
    let known = site.entry("encryption_keys").or_insert_with(|| json!({}));
    if known.is_null() {
        *known = json!({});
    }
    let known = known.as_object_mut().ok_or_else(|| anyhow!("`encryption_keys` is not an object"))?;
    known.insert(id.to_owned(), json!({ "private": keys.private.reveal(), "public": keys.public }));
    site.insert("encryption_key_id".to_owned(), json!(id));
    Ok(site)
}

/// Writes the file anew beside the old one, with the old one's owner and mode: it holds secrets.
fn write(path: &Path, document: &Value) -> anyhow::Result<()> {
    let path = path.canonicalize()?;
    let before = path.metadata()?;
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let written = (|| {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(pghoard_json(document).as_bytes())?;
        file.write_all(b"\n")?;
        let mine = file.metadata()?;
        if (mine.uid(), mine.gid()) != (before.uid(), before.gid()) {
            std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()))?;
        }
        file.set_permissions(fs::Permissions::from_mode(before.mode() & 0o7777))?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    })();
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    Ok(written?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(site: Option<&str>) -> Options {
        Options {
            debug: false,
            site: site.map(str::to_owned),
            key_id: "k2".to_owned(),
            bits: 2048,
            config: None,
        }
    }

    #[test]
    fn a_key_is_added_beside_the_old_ones_and_selected() {
        let mut document = json!({ "http_port": 1, "backup_sites": { "main": {
            "encryption_key_id": "k1", "encryption_keys": { "k1": { "public": "x" } }, "nodes": [] } } });
        assert_eq!(add_to(&mut document, &options(None), Path::new("c.json")).unwrap(), "main");
        let site = &document["backup_sites"]["main"];
        assert_eq!(site["encryption_key_id"], "k2");
        assert_eq!(site["encryption_keys"]["k1"]["public"], "x");
        assert!(site["encryption_keys"]["k2"]["private"].as_str().unwrap().starts_with("-----BEGIN PRIVATE"));
        let again = add_to(&mut document, &options(None), Path::new("c.json")).unwrap_err();
        assert_eq!(again.to_string(), "key_id 'k2' already defined for site 'main' in 'c.json'");
        assert!(add_to(&mut document, &options(Some("other")), Path::new("c.json")).is_err());
    }

    #[test]
    fn the_file_keeps_its_mode() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pghoard.json");
        fs::write(&path, "{}").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        write(&path, &json!({ "a": 1 })).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n    \"a\": 1\n}\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
