//! The supported operations of S3. s3s answers all others with 501.

use std::sync::Arc;

use hyper::HeaderMap;
use s3s::dto::*;
use s3s::{S3, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};

use super::store::Store;
use super::{Error, internal_error};

/// The operations of one store. They are implemented in `objects`, `multipart` and `listing`.
pub(super) struct Api {
    pub(super) store: Arc<Store>,
}

impl Api {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Runs disk work on the blocking pool. The work runs to its end even if the client disconnects.
    pub(super) async fn blocking<T, F>(&self, work: F) -> S3Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Store) -> S3Result<T> + Send + 'static,
    {
        let store = Arc::clone(&self.store);
        tokio::task::spawn_blocking(move || work(&store)).await.map_err(internal_error)?
    }
}

/// The prefixes of headers for unsupported features. Ignoring such a header would give a wrong result.
const UNSUPPORTED_HEADERS: [&str; 7] = [
    "x-amz-acl",
    "x-amz-grant-",
    "x-amz-object-lock-",
    "x-amz-server-side-encryption",
    "x-amz-tagging",
    "x-amz-website-redirect-location",
    "x-amz-write-offset-bytes",
];

/// Refuses a write with a header for an unsupported feature.
pub(super) fn reject_unsupported_headers(headers: &HeaderMap) -> S3Result<()> {
    match headers.keys().find(|name| UNSUPPORTED_HEADERS.iter().any(|unknown| name.as_str().starts_with(unknown))) {
        Some(name) => {
            Err(s3_error!(NotImplemented, "A header you provided implies functionality that is not implemented: {name}"))
        }
        None => Ok(()),
    }
}

/// Accepts only the version `null`, the only version of objects in a bucket without versioning.
pub(super) fn check_null_version(version: Option<&str>) -> S3Result<()> {
    match version {
        None | Some("null") => Ok(()),
        Some(other) => Err(s3_error!(InvalidArgument, "Invalid version id specified: {other}")),
    }
}

type Response<T> = S3Result<S3Response<T>>;

#[async_trait::async_trait]
impl S3 for Api {
    async fn create_bucket(&self, request: S3Request<CreateBucketInput>) -> Response<CreateBucketOutput> {
        let bucket = request.input.bucket;
        let location = format!("/{bucket}");
        let created = self.blocking(move |store| match store.create_bucket(&bucket) {
            Err(Error::BucketName(_)) => Err(S3ErrorCode::InvalidBucketName.into()),
            created => created.map_err(internal_error),
        });
        if !created.await? {
            return Err(s3_error!(BucketAlreadyOwnedByYou, "Your previous request to create the named bucket succeeded"));
        }
        Ok(S3Response::new(CreateBucketOutput { location: Some(location) }))
    }

    async fn head_bucket(&self, request: S3Request<HeadBucketInput>) -> Response<HeadBucketOutput> {
        self.store.with_bucket(&request.input.bucket, |_| Ok(()))?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn list_buckets(&self, _: S3Request<ListBucketsInput>) -> Response<ListBucketsOutput> {
        Ok(S3Response::new(self.buckets()))
    }

    async fn get_bucket_versioning(&self, request: S3Request<GetBucketVersioningInput>) -> Response<GetBucketVersioningOutput> {
        self.store.with_bucket(&request.input.bucket, |_| Ok(()))?;
        Ok(S3Response::new(GetBucketVersioningOutput::default()))
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> Response<PutObjectOutput> {
        self.put(request).await.map(S3Response::new)
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> Response<GetObjectOutput> {
        self.get(&request.input).map(S3Response::new)
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> Response<HeadObjectOutput> {
        self.head(&request.input).map(S3Response::new)
    }

    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> Response<CopyObjectOutput> {
        self.copy(request).await.map(S3Response::new)
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> Response<DeleteObjectOutput> {
        self.delete(request.input).await.map(S3Response::new)
    }

    async fn delete_objects(&self, request: S3Request<DeleteObjectsInput>) -> Response<DeleteObjectsOutput> {
        self.delete_many(request.input).await.map(S3Response::new)
    }

    async fn list_objects_v2(&self, request: S3Request<ListObjectsV2Input>) -> Response<ListObjectsV2Output> {
        self.objects(request.input).map(S3Response::new)
    }

    async fn list_object_versions(&self, request: S3Request<ListObjectVersionsInput>) -> Response<ListObjectVersionsOutput> {
        self.versions(request.input).map(S3Response::new)
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> Response<CreateMultipartUploadOutput> {
        self.create_upload(request).await.map(S3Response::new)
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> Response<UploadPartOutput> {
        self.put_part(request).await.map(S3Response::new)
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> Response<CompleteMultipartUploadOutput> {
        self.complete(request.input).await.map(S3Response::new)
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> Response<AbortMultipartUploadOutput> {
        let AbortMultipartUploadInput { bucket, key, upload_id, .. } = request.input;
        self.blocking(move |store| store.abort(&bucket, &key, &upload_id)).await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_parts(&self, request: S3Request<ListPartsInput>) -> Response<ListPartsOutput> {
        self.parts(request.input).map(S3Response::new)
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> Response<ListMultipartUploadsOutput> {
        self.uploads(request.input).map(S3Response::new)
    }
}
