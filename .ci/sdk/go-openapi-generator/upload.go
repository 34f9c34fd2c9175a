// Uploads through the generated client: one PUT, then parts; reads the state, completes, resolves, compares.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"reflect"
	"strings"

	"sdk/contract"
)

const partSize = 5 << 20

var (
	ctx      = context.Background()
	uploads  *contract.UploadsAPIService
	pointers *contract.PointersAPIService
)

func check(holds bool, found any) {
	if !holds {
		log.Panicf("unexpected: %+v", found)
	}
}

// must returns the value of a call of the generated client.
func must[T any](value T, _ *http.Response, err error) T {
	var refused *contract.GenericOpenAPIError
	if errors.As(err, &refused) {
		log.Panicf("%v: %s", err, refused.Body())
	}
	return ok(value, err)
}

func ok[T any](value T, err error) T {
	if err != nil {
		log.Panic(err)
	}
	return value
}

func hexSha256(value []byte) string {
	sum := sha256.Sum256(value)
	return hex.EncodeToString(sum[:])
}

func open(request *contract.OpenUpload) *contract.Upload {
	return must(uploads.OpenUpload(ctx).OpenUpload(*request).Execute())
}

func put(method, url string, headers map[string]string, value []byte) {
	request := ok(http.NewRequest(method, url, bytes.NewReader(value)))
	for name, text := range headers {
		if !strings.EqualFold(name, "content-length") {
			request.Header.Set(name, text)
		}
	}
	response := ok(http.DefaultClient.Do(request))
	defer response.Body.Close()
	check(response.StatusCode == http.StatusOK, response.Status)
}

func putPart(part contract.SignedPart, value []byte) {
	put(part.Method, part.Url, part.Headers, value[part.Offset:part.Offset+part.Size])
}

// complete completes an upload. If the broker needs more time, it waits until the bytes are verified.
func complete(id string, request *contract.CompleteUpload) contract.Pointer {
	completed := must(uploads.CompleteUpload(ctx, id).CompleteUpload(*request).Execute())
	switch found := completed.GetActualInstance().(type) {
	case *contract.Published:
		check(found.Record.Offset >= 0, found)
		return found.Pointer
	case *contract.Verified:
		return found.Pointer
	}
	for range 6 {
		upload := must(uploads.GetUpload(ctx, id).Wait(10).Execute())
		if upload.Pointer != nil {
			return *upload.Pointer
		}
	}
	log.Panicf("upload %s is not verified after a minute", id)
	return contract.Pointer{}
}

func download(pointer contract.Pointer) []byte {
	answer := must(pointers.ResolvePointer(ctx).Topic("sdk-go-openapi-generator").Pointer(pointer).Execute())
	resolved := answer.Resolved
	check(resolved != nil && resolved.Size == pointer.Size, answer)
	response := ok(http.Get(resolved.Url))
	defer response.Body.Close()
	return ok(io.ReadAll(response.Body))
}

func single() {
	value := []byte("hello from a generated client")
	request := contract.NewOpenUpload("sdk-go-openapi-generator", int64(len(value)))
	request.SetKey("single")
	request.SetSha256(hexSha256(value))
	request.SetHeaders(map[string]string{"a": "b"})
	upload := open(request)
	check(upload.Mode == contract.SINGLE && upload.Upload != nil, upload)
	_, _, err := uploads.CompleteUpload(ctx, upload.Id).Execute()
	var refused *contract.GenericOpenAPIError
	check(errors.As(err, &refused), err)
	problem, isProblem := refused.Model().(contract.Problem)
	check(isProblem && problem.Code == contract.OBJECT_MISSING && problem.Retryable, string(refused.Body()))
	put(upload.Upload.Method, upload.Upload.Url, upload.Upload.Headers, value)
	check(bytes.Equal(download(complete(upload.Id, contract.NewCompleteUpload())), value), "other bytes")
}

func parts() {
	value := make([]byte, 2*partSize+17)
	rand.Read(value)
	request := contract.NewOpenUpload("sdk-go-openapi-generator", int64(len(value)))
	request.SetKey("parts")
	request.SetPartSize(partSize)
	upload := open(request)
	check(upload.Mode == contract.MULTIPART && *upload.PartCount == 3, upload)
	putPart(upload.Parts[0], value)
	// A client that has crashed can ask the broker which parts are missing in S3.
	now := must(uploads.GetUpload(ctx, upload.Id).Execute())
	check(*now.Next == contract.PARTS && reflect.DeepEqual(now.MissingParts, [][]int32{{2, 3}}), now)
	signed := must(uploads.SignParts(ctx, upload.Id).SignParts(contract.SignParts{PartNumbers: []int32{2, 3}}).Execute())
	for _, part := range signed.Parts {
		putPart(part, value)
	}
	sha256 := contract.NewCompleteUpload()
	sha256.SetSha256(hexSha256(value))
	check(bytes.Equal(download(complete(upload.Id, sha256)), value), "other bytes")
}

func aborted() {
	request := contract.NewOpenUpload("sdk-go-openapi-generator", 1)
	request.SetSha256(hexSha256(make([]byte, 1)))
	upload := open(request)
	answer := ok(uploads.AbortUpload(ctx, upload.Id).Execute())
	check(answer.StatusCode == http.StatusNoContent, answer.Status)
	var states []contract.UploadState
	for _, step := range must(uploads.GetUploadHistory(ctx, upload.Id).Execute()).Items {
		states = append(states, step.To)
	}
	check(reflect.DeepEqual(states, []contract.UploadState{contract.OPEN, contract.ABORTED}), states)
}

// decodeCompleting decodes the `completing` response, which a fast broker seldom returns.
func decodeCompleting() {
	var completed contract.Completed
	completing := `{"id":"01934d2e-7c00-7000-8000-5f2b8c1d9e3a","state":"completing"}`
	check(json.Unmarshal([]byte(completing), &completed) == nil && completed.Completing != nil, completed)
}

func main() {
	log.SetFlags(0)
	configuration := contract.NewConfiguration()
	configuration.Servers = contract.ServerConfigurations{{URL: os.Getenv("LFS_BROKER_URL")}}
	client := contract.NewAPIClient(configuration)
	uploads, pointers = client.UploadsAPI, client.PointersAPI
	single()
	parts()
	aborted()
	decodeCompleting()
	fmt.Println("Go, openapi-generator: one PUT and three parts were uploaded, completed, resolved and compared by a generated client")
}
